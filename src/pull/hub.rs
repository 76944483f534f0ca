//! `OWNER/NAME/FILE.gguf` over HTTP: resumable, verified, retried.
//!
//! Redirects are followed by hand, for two reasons: the SHA-256 of a large file is a header of the first answer,
//! which is a redirect, and the token must not go on to the host that the redirect names.

use super::cache::{self, CHUNK, Expected, Lock, beside};
use super::error::PullError;
use super::progress;
use indicatif::ProgressBar;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;
use ureq::http::{Response, Uri};
use ureq::{Agent, Body};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// How the site itself writes links to its files.
const PREFIXES: [&str; 5] =
    ["https://huggingface.co/", "https://hf.co/", "huggingface.co/", "hf.co/", "hf://"];
/// Attempts in a row that bring no byte before a download is given up.
const ATTEMPTS: u32 = 4;
const MAX_REDIRECTS: usize = 10;
/// More shards than any published model has; bounds what a file name can ask for.
const MAX_SHARDS: u32 = 1000;

/// One file of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HubFile {
    owner: String,
    name: String,
    revision: String,
    /// May lie in a directory of the repository.
    file: String,
}

impl HubFile {
    /// Reads `OWNER/NAME/FILE.gguf`, with a site prefix or without, with `@REVISION` behind the file or the name.
    /// `None` if it is not of that form; an error if it is, but must not be used.
    pub(super) fn parse(spec: &str) -> Option<Result<HubFile, PullError>> {
        let bare = PREFIXES.iter().find_map(|p| spec.strip_prefix(p));
        let (path, mut revision) = match bare.unwrap_or(spec).split_once(".gguf@") {
            Some((path, revision)) => (format!("{path}.gguf"), Some(revision.to_owned())),
            None => (bare.unwrap_or(spec).to_owned(), None),
        };
        let mut parts: Vec<&str> = path.split('/').collect();
        if !path.ends_with(".gguf") || parts.len() < 3 {
            return None;
        }
        // A link as copied from a browser.
        if bare.is_some() && parts.len() > 4 && matches!(parts[2], "resolve" | "blob") {
            revision = Some(parts[3].into());
            parts.drain(2..4);
        }
        let mut name = parts[1];
        if let Some((before, after)) = name.split_once('@') {
            (name, revision) = (before, Some(after.into()));
        }
        let revision = revision.unwrap_or_else(|| "main".into());
        let file =
            HubFile { owner: parts[0].into(), name: name.into(), revision, file: parts[2..].join("/") };
        Some(file.checked(spec))
    }

    /// Refuses whatever could leave the cache directory or the repository's URL.
    fn checked(self, given: &str) -> Result<HubFile, PullError> {
        let bad = |why| PullError::BadName { given: given.escape_default().to_string(), why };
        if given.len() > 512 {
            return Err(bad("too long"));
        }
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if ![&self.owner, &self.name].iter().all(|s| s.chars().all(is_plain)) {
            return Err(bad("owner and name consist of letters, digits, `-`, `_` and `.`"));
        }
        let components = [&self.owner, &self.name].map(String::as_str).into_iter();
        for part in components.chain(self.revision.split('/')).chain(self.file.split('/')) {
            if part.is_empty() {
                return Err(bad("a part of it is empty"));
            }
            if part.starts_with('.') {
                return Err(bad("a part of it starts with a dot"));
            }
            if part.contains(|c: char| c.is_control() || matches!(c, '\\' | ':' | '%')) {
                return Err(bad("it contains a character that names do not have"));
            }
        }
        Ok(self)
    }

    /// `OWNER/NAME`.
    fn repo(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }

    /// What is to be read with `-m`: the first shard of a split file, else the file itself.
    fn first(&self) -> Result<HubFile, PullError> {
        Ok(self.shards()?.into_iter().next().unwrap_or_else(|| self.clone()))
    }

    /// Every shard of a split file; otherwise the file alone.
    fn shards(&self) -> Result<Vec<HubFile>, PullError> {
        let Some((stem, index, count)) = split_name(&self.file) else { return Ok(vec![self.clone()]) };
        if count == 0 || count > MAX_SHARDS || index == 0 || index > count {
            return Err(PullError::BadName { given: self.file.clone(), why: "no such shard can exist" });
        }
        let shard = |i| HubFile { file: format!("{stem}-{i:05}-of-{count:05}.gguf"), ..self.clone() };
        Ok((1..=count).map(shard).collect())
    }

    /// Where it lies in the cache.
    fn target(&self, cache: &Path) -> PathBuf {
        let mut name = self.name.clone();
        if self.revision != "main" {
            // `/` may be part of a revision but not of a directory's name; `%` is in neither.
            name = format!("{name}@{}", self.revision.replace('/', "%"));
        }
        cache.join("hf").join(&self.owner).join(name).join(&self.file)
    }

    /// The first shard's path if all shards are in the cache and whole.
    pub(super) fn cached(&self, cache: &Path) -> Result<Option<PathBuf>, PullError> {
        for shard in self.shards()? {
            if !cache::is_good(&shard.target(cache), &Expected::default())? {
                return Ok(None);
            }
        }
        Ok(Some(self.first()?.target(cache)))
    }
}

/// `x-00002-of-00005.gguf` as `(x, 2, 5)`.
fn split_name(file: &str) -> Option<(&str, u32, u32)> {
    let (rest, count) = file.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, index) = rest.rsplit_once('-')?;
    let number = |s: &str| s.parse().ok().filter(|_| s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit()));
    Some((stem, number(index)?, number(count)?))
}

/// A server with the paths of the Hugging Face hub.
pub(super) struct Hub {
    endpoint: String,
    token: Option<String>,
    backoff: Duration,
    agent: Agent,
}

/// Why an attempt brought no whole file.
enum Failure {
    /// Trying again would not help.
    Final(PullError),
    /// It may, after this time if the server named one.
    Transient { why: String, after: Option<Duration> },
}

impl From<PullError> for Failure {
    fn from(error: PullError) -> Self {
        Failure::Final(error)
    }
}

/// The answer behind the last redirect, and what the hub said about the file on the way.
struct Answer {
    response: Response<Body>,
    linked: Expected,
}

impl Hub {
    /// `endpoint` without a slash at its end; `backoff` is the first pause between attempts.
    pub(super) fn new(endpoint: Option<&str>, token: Option<&str>, backoff: Duration) -> Hub {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            // Compressed, neither lengths nor ranges would be those of the file.
            .accept_encoding("identity")
            .user_agent(concat!("skiff/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(Duration::from_secs(20)))
            .timeout_connect(Some(Duration::from_secs(20)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            // A stalled transfer is cut and resumed; there is no limit for the whole.
            .timeout_per_read(Some(Duration::from_secs(60)));
        let endpoint = endpoint.unwrap_or(DEFAULT_ENDPOINT).trim_end_matches('/').to_owned();
        let token = token.map(str::trim).filter(|t| !t.is_empty()).map(str::to_owned);
        Hub { endpoint, token, backoff, agent: config.build().new_agent() }
    }

    /// Brings all shards of `file` to `cache`; the path of the first.
    pub(super) fn pull(&self, file: &HubFile, cache: &Path) -> Result<PathBuf, PullError> {
        for shard in file.shards()? {
            self.pull_one(&shard, &shard.target(cache))?;
        }
        Ok(file.first()?.target(cache))
    }

    fn pull_one(&self, file: &HubFile, target: &Path) -> Result<(), PullError> {
        let _lock = Lock::of(target)?;
        if cache::is_good(target, &Expected::default())? {
            return Ok(());
        }
        let part = Part::of(target);
        let url = self.url(file);
        let bar = progress::bar("pulling", &cache::file_name(target), 0);
        let (mut attempt, mut had) = (1, part.len());
        let expected = loop {
            let (why, after) = match self.attempt(&url, file, &part, &bar) {
                Ok(expected) => break expected,
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Transient { why, after }) => (why, after),
            };
            let has = part.len();
            attempt = if has > had { 1 } else { attempt + 1 };
            had = has;
            if attempt > ATTEMPTS {
                return Err(PullError::Download { url, why });
            }
            bar.suspend(|| eprintln!("warning: {why}; trying again"));
            thread::sleep(after.unwrap_or(self.backoff * 2u32.pow(attempt - 1)));
        };
        bar.finish_and_clear();
        part.forget_meta();
        cache::publish(&part.path, target, &expected)
    }

    fn url(&self, file: &HubFile) -> String {
        let (revision, path) = (escape(&file.revision), escape(&file.file));
        // A `/` within a revision would be read as the start of the path.
        format!("{}/{}/resolve/{}/{path}", self.endpoint, file.repo(), revision.replace('/', "%2F"))
    }

    /// One request, from where the part ends. The part is whole when this returns.
    fn attempt(
        &self,
        url: &str,
        file: &HubFile,
        part: &Part,
        bar: &ProgressBar,
    ) -> Result<Expected, Failure> {
        let resume = part.resume();
        let Answer { response, linked } = self.get(url, resume.as_ref())?;
        let status = response.status().as_u16();
        match (status, &resume) {
            (200, _) => self.receive(response, linked, part, 0, bar),
            (206, Some(from)) if continues(&response, from) => {
                self.receive(response, linked, part, from.offset, bar)
            }
            (416, Some(from)) if is_whole(&response, from, &linked) => {
                Ok(Expected { bytes: Some(from.offset), ..linked })
            }
            // The part does not fit what the server has now.
            (206 | 416, Some(_)) => {
                part.discard()?;
                Err(transient(format!("the file has changed on the server (HTTP {status})")))
            }
            (404, _) => Err(Failure::Final(PullError::NotFound {
                repo: file.repo(),
                revision: file.revision.clone(),
                file: file.file.clone(),
            })),
            (401 | 403, _) => Err(Failure::Final(PullError::Denied { repo: file.repo(), status })),
            (408 | 429 | 500 | 502 | 503 | 504, _) => {
                let after = header(&response, "retry-after").and_then(|s| s.parse().ok());
                // Whoever asks for hours is not waited for.
                let after = after.map(|s: u64| Duration::from_secs(s.min(60)));
                Err(Failure::Transient { why: format!("HTTP {status}"), after })
            }
            _ => Err(Failure::Final(PullError::Download { url: url.into(), why: format!("HTTP {status}") })),
        }
    }

    /// Follows redirects. The token goes to the endpoint's own host and no other.
    fn get(&self, url: &str, resume: Option<&Resume>) -> Result<Answer, Failure> {
        let give_up = |why: &str| Failure::Final(PullError::Download { url: url.into(), why: why.into() });
        let mut at: Uri = url.parse().map_err(|e| give_up(&format!("bad address: {e}")))?;
        let home = origin(&at);
        let mut linked = Expected::default();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.agent.get(at.clone());
            if let Some(token) = self.token.as_ref().filter(|_| origin(&at) == home) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            if let Some(from) = resume {
                request =
                    request.header("Range", format!("bytes={}-", from.offset)).header("If-Range", &from.etag);
            }
            let response = request.call().map_err(|e| self.sort(url, e))?;
            if origin(&at) == home {
                note_linked(&response, &mut linked);
            }
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(Answer { response, linked });
            }
            let location = header(&response, "location").ok_or_else(|| give_up("a redirect to nowhere"))?;
            at = redirect(&at, &location).ok_or_else(|| give_up("a redirect that cannot be followed"))?;
        }
        Err(give_up("too many redirects"))
    }

    /// Which errors are worth another attempt.
    fn sort(&self, url: &str, error: ureq::Error) -> Failure {
        use ureq::Error::{ConnectionFailed, Io, Protocol, Timeout};
        match error {
            Timeout(_) | Io(_) | ConnectionFailed | Protocol(_) => transient(error.to_string()),
            _ => Failure::Final(PullError::Download { url: url.into(), why: error.to_string() }),
        }
    }

    /// Writes the body behind the first `offset` bytes of the part.
    fn receive(
        &self,
        response: Response<Body>,
        linked: Expected,
        part: &Part,
        offset: u64,
        bar: &ProgressBar,
    ) -> Result<Expected, Failure> {
        let length = header(&response, "content-length").and_then(|s| s.parse::<u64>().ok());
        let total = length.and_then(|n| n.checked_add(offset));
        if let Some((total, expected)) = total.zip(linked.bytes).filter(|(a, b)| a != b) {
            return Err(PullError::Length { path: part.path.clone(), expected, found: total }.into());
        }
        let total = total.or(linked.bytes);
        let mut file = part.open(offset)?;
        part.remember(header(&response, "etag").as_deref())?;
        bar.set_length(total.unwrap_or(offset));
        bar.set_position(offset);
        // Otherwise the bytes of the last run would count as this one's speed.
        bar.reset_eta();
        let written = copy(response, &mut file, part, bar)?;
        let found = offset + written;
        match total {
            Some(total) if found < total => {
                Err(transient(format!("the connection was cut at {found} of {total} bytes")))
            }
            _ => Ok(Expected { bytes: total, ..linked }),
        }
    }
}

fn transient(why: String) -> Failure {
    Failure::Transient { why, after: None }
}

/// Returns the number of bytes written. What has been written stays, so that the next attempt goes on from there.
fn copy(response: Response<Body>, file: &mut File, part: &Part, bar: &ProgressBar) -> Result<u64, Failure> {
    let mut body = response.into_body().into_reader();
    let mut buffer = vec![0; CHUNK];
    let mut written = 0;
    loop {
        let n = match body.read(&mut buffer) {
            Ok(0) => return Ok(written),
            Ok(n) => n,
            Err(e) => return Err(transient(format!("the connection was cut: {e}"))),
        };
        file.write_all(&buffer[..n]).map_err(PullError::io("write", &part.path))?;
        written += n as u64;
        bar.inc(n as u64);
    }
}

/// The bytes that have arrived, and the ETag of the file that they belong to.
struct Part {
    path: PathBuf,
    etag: PathBuf,
}

/// From where, and of which version, a download goes on.
struct Resume {
    offset: u64,
    etag: String,
}

impl Part {
    fn of(target: &Path) -> Part {
        Part { path: beside(target, ".part"), etag: beside(target, ".part.etag") }
    }

    fn len(&self) -> u64 {
        fs::metadata(&self.path).map_or(0, |m| m.len())
    }

    /// Without an ETag nobody knows what the bytes belong to, and the download starts again.
    fn resume(&self) -> Option<Resume> {
        let etag = fs::read_to_string(&self.etag).ok().filter(|e| is_strong(e))?;
        Some(Resume { offset: self.len(), etag }).filter(|r| r.offset > 0)
    }

    /// Opens the part for writing behind its first `offset` bytes.
    fn open(&self, offset: u64) -> Result<File, PullError> {
        use std::io::{Seek, SeekFrom};
        if offset == 0 {
            // Old bytes must not outlive their ETag, or the other way round.
            self.discard()?;
        }
        let file = File::options().create(true).truncate(false).write(true).open(&self.path);
        let mut file = file.map_err(PullError::io("create", &self.path))?;
        file.seek(SeekFrom::Start(offset)).map_err(PullError::io("write", &self.path))?;
        Ok(file)
    }

    /// Notes the version that the bytes belong to. A weak ETag does not promise equal bytes.
    fn remember(&self, etag: Option<&str>) -> Result<(), PullError> {
        match etag.filter(|e| is_strong(e)) {
            Some(etag) => fs::write(&self.etag, etag).map_err(PullError::io("write", &self.etag)),
            None => {
                self.forget_meta();
                Ok(())
            }
        }
    }

    fn forget_meta(&self) {
        let _ = fs::remove_file(&self.etag);
    }

    fn discard(&self) -> Result<(), PullError> {
        self.forget_meta();
        match fs::remove_file(&self.path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(PullError::io("remove", &self.path)(e)),
            _ => Ok(()),
        }
    }
}

/// A quoted ETag without `W/`; anything else cannot stand in `If-Range`.
fn is_strong(etag: &str) -> bool {
    let inner = etag.strip_prefix('"').and_then(|e| e.strip_suffix('"'));
    inner.is_some_and(|e| !e.is_empty() && e.bytes().all(|b| b.is_ascii_graphic() && b != b'"'))
}

/// True if a 206 answer starts where the part ends and is of the same version.
fn continues(response: &Response<Body>, from: &Resume) -> bool {
    let range = header(response, "content-range").unwrap_or_default();
    let starts =
        range.strip_prefix("bytes ").and_then(|r| r.split_once('-')).and_then(|(s, _)| s.parse().ok());
    starts == Some(from.offset) && header(response, "etag").is_none_or(|e| e == from.etag)
}

/// True if a 416 answer means that nothing is missing: the lengths agree, and a hash or an ETag confirms it.
fn is_whole(response: &Response<Body>, from: &Resume, linked: &Expected) -> bool {
    let range = header(response, "content-range").unwrap_or_default();
    let total = range.strip_prefix("bytes */").and_then(|n| n.parse().ok());
    let same = linked.sha256.is_some() || header(response, "etag").is_some_and(|e| e == from.etag);
    total == Some(from.offset) && same
}

/// The hub names length and SHA-256 of a file in large-file storage, before it redirects to it.
fn note_linked(response: &Response<Body>, linked: &mut Expected) {
    if let Some(etag) = header(response, "x-linked-etag") {
        let sha256 = etag.trim_matches('"').to_ascii_lowercase();
        linked.sha256 = Some(sha256).filter(|s| cache::is_sha256(s)).or(linked.sha256.take());
    }
    if let Some(bytes) = header(response, "x-linked-size").and_then(|s| s.parse().ok()) {
        linked.bytes = Some(bytes);
    }
}

fn header(response: &Response<Body>, name: &str) -> Option<String> {
    Some(response.headers().get(name)?.to_str().ok()?.trim().to_owned())
}

/// Scheme, host and port: what has to agree for a token to be sent.
fn origin(uri: &Uri) -> (Option<String>, Option<String>, Option<u16>) {
    let scheme = uri.scheme_str().map(str::to_ascii_lowercase);
    let port = uri.port_u16().or(match scheme.as_deref() {
        Some("http") => Some(80),
        Some("https") => Some(443),
        _ => None,
    });
    (scheme, uri.host().map(str::to_ascii_lowercase), port)
}

/// Where a `Location` leads, seen from `at`. From https it must not lead back to http.
fn redirect(at: &Uri, location: &str) -> Option<Uri> {
    let location = location.split('#').next()?;
    let scheme = at.scheme_str()?;
    let text = if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{}{location}", at.authority()?)
    } else {
        location.to_owned()
    };
    let to: Uri = text.parse().ok()?;
    let allowed = match to.scheme_str()? {
        "https" => true,
        "http" => scheme == "http",
        _ => false,
    };
    allowed.then_some(to)
}

/// Percent-encodes all but unreserved characters and `/`.
fn escape(path: &str) -> String {
    use std::fmt::Write;
    let mut out = String::with_capacity(path.len());
    for &b in path.as_bytes() {
        if b.is_ascii_alphanumeric() || b"-_.~/".contains(&b) {
            out.push(b as char);
        } else {
            // Writing to a string does not fail.
            let _ = write!(out, "%{b:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(spec: &str) -> HubFile {
        HubFile::parse(spec).expect("of the form").expect("allowed")
    }

    #[test]
    fn specs_are_read_in_every_spelling() {
        let plain = parse("o/n/f.gguf");
        assert_eq!((plain.repo().as_str(), plain.revision.as_str()), ("o/n", "main"));
        assert_eq!(parse("hf.co/o/n/f.gguf"), plain);
        assert_eq!(parse("https://huggingface.co/o/n/resolve/main/f.gguf"), plain);
        let at = parse("o/n/d/f.gguf@refs/pr/1");
        assert_eq!((at.file.as_str(), at.revision.as_str()), ("d/f.gguf", "refs/pr/1"));
        assert_eq!(parse("o/n@v1/f.gguf").revision, "v1");
        for other in ["f.gguf", "o/f.gguf", "o/n/f.bin", "", "o/n/"] {
            assert!(HubFile::parse(other).is_none(), "{other}");
        }
    }

    #[test]
    fn names_that_would_leave_the_cache_are_refused() {
        for spec in [
            "../../f.gguf",
            "o/../f.gguf",
            "o/n/../../f.gguf",
            "/etc/n/f.gguf",
            "o//f.gguf",
            "o/n/.hidden.gguf",
            "o/n/a\\..\\f.gguf",
            "o/n/f.gguf@../x",
            "o/n@../f.gguf",
            "o/n/%2e%2e/f.gguf",
            "o/n/c:f.gguf",
            "o/n/\0.gguf",
            "o x/n/f.gguf",
        ] {
            let refused = matches!(HubFile::parse(spec), Some(Err(PullError::BadName { .. })));
            assert!(refused, "{spec:?} must be refused");
        }
    }

    #[test]
    fn shards_are_enumerated_and_bounded() {
        let shards = parse("o/n/f-00002-of-00003.gguf").shards().unwrap();
        let files: Vec<_> = shards.iter().map(|s| s.file.as_str()).collect();
        assert_eq!(files, ["f-00001-of-00003.gguf", "f-00002-of-00003.gguf", "f-00003-of-00003.gguf"]);
        assert_eq!(parse("o/n/f-1-of-3.gguf").shards().unwrap().len(), 1);
        for bad in ["f-00001-of-99999.gguf", "f-00000-of-00002.gguf", "f-00003-of-00002.gguf"] {
            assert!(parse(&format!("o/n/{bad}")).shards().is_err(), "{bad}");
        }
    }

    #[test]
    fn urls_are_escaped_and_revisions_have_their_own_directory() {
        let hub = Hub::new(Some("http://h/"), None, Duration::ZERO);
        let file = parse("o/n/a b#?.gguf@refs/pr/1");
        assert_eq!(hub.url(&file), "http://h/o/n/resolve/refs%2Fpr%2F1/a%20b%23%3F.gguf");
        assert_eq!(file.target(Path::new("/c")), Path::new("/c/hf/o/n@refs%pr%1/a b#?.gguf"));
    }

    #[test]
    fn redirects_resolve_and_never_lose_encryption() {
        let at: Uri = "https://a/x".parse().unwrap();
        let to = |l: &str| redirect(&at, l).map(|u| u.to_string());
        assert_eq!(to("/y?q=1"), Some("https://a/y?q=1".into()));
        assert_eq!(to("//b/y"), Some("https://b/y".into()));
        assert_eq!(to("https://b/y#frag"), Some("https://b/y".into()));
        assert_eq!((to("http://b/y"), to("file:///etc/passwd"), to("y")), (None, None, None));
        assert_eq!(origin(&at), origin(&"https://A:443/z".parse().unwrap()));
        assert_ne!(origin(&at), origin(&"https://a:444/".parse().unwrap()));
    }

    #[test]
    fn only_strong_etags_count() {
        assert!(is_strong("\"abc\""));
        for weak in ["W/\"abc\"", "abc", "\"\"", "\"a\r\nb\"", "\"a\"b\""] {
            assert!(!is_strong(weak), "{weak}");
        }
    }
}

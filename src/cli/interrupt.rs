//! Ctrl-C. While something listens, the first one only raises a flag; otherwise it ends the process.

use std::sync::atomic::{AtomicU8, Ordering};

/// What shells report for a process that SIGINT ended.
pub(super) const EXIT_CODE: u8 = 130;

const NOBODY: u8 = 0;
const LISTENING: u8 = 1;
const RAISED: u8 = 2;

/// There is one handler a process, so there is one state.
static STATE: AtomicU8 = AtomicU8::new(NOBODY);

/// Installs the handler. Where that fails, Ctrl-C keeps its usual meaning.
pub(super) fn install() {
    let _ = ctrlc::set_handler(|| {
        let raised = STATE.compare_exchange(LISTENING, RAISED, Ordering::SeqCst, Ordering::SeqCst);
        if raised.is_err() {
            std::process::exit(EXIT_CODE.into());
        }
    });
}

/// While this lives, the first Ctrl-C is kept for [`raised`](Self::raised); a second one ends the process.
pub(super) struct Listener(());

impl Listener {
    pub(super) fn new() -> Self {
        STATE.store(LISTENING, Ordering::SeqCst);
        Self(())
    }

    pub(super) fn raised(&self) -> bool {
        STATE.load(Ordering::SeqCst) == RAISED
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        STATE.store(NOBODY, Ordering::SeqCst);
    }
}

//! The terminal while it is redrawn: put back as it was, however the command ends.

use std::io::{IsTerminal as _, Read as _};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::frame::Size;
use crate::failure::{Failure, Outcome};
use crate::output;

/// The screen that programs draw on, so that what was there before comes back; no cursor.
const ENTER: &str = "\u{1b}[?1049h\u{1b}[?25l";
const LEAVE: &str = "\u{1b}[?25h\u{1b}[?1049l";
/// A terminal that does not say how large it is.
const SIZE_UNKNOWN: Size = Size { columns: 80, rows: 24 };

/// A terminal that is drawn on.
#[derive(Debug)]
pub struct Screen {
    /// None where stdin is no terminal: then there are no keys.
    before: Option<Termios>,
}

impl Screen {
    /// Takes the terminal over; none where stdout is no terminal.
    pub fn enter() -> Outcome<Option<Self>> {
        if !std::io::stdout().is_terminal() {
            return Ok(None);
        }
        let stdin = std::io::stdin();
        let before = tcgetattr(&stdin).ok();
        if let Some(before) = &before {
            // Keys at once and unseen; Ctrl-C stays what it is.
            let mut now = before.clone();
            now.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO);
            tcsetattr(&stdin, OptionalActions::Now, &now)
                .map_err(|e| Failure::failed("read keys from the terminal", e))?;
        }
        let screen = Self { before };
        output::print(ENTER)?;
        Ok(Some(screen))
    }

    /// How large it is now.
    pub fn size(&self) -> Size {
        match tcgetwinsize(std::io::stdout()) {
            Ok(size) if size.ws_col > 0 && size.ws_row > 0 => {
                Size { columns: size.ws_col.into(), rows: size.ws_row.into() }
            }
            _ => SIZE_UNKNOWN,
        }
    }

    /// Draws lines over what is there, without a flicker.
    pub fn draw(&self, lines: &[String]) -> Outcome<()> {
        let mut text = String::from("\u{1b}[H");
        for line in lines {
            text += line;
            text += "\u{1b}[K\r\n";
        }
        output::print(&(text + "\u{1b}[J"))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Nothing can be done about a terminal that is gone.
        let _ = output::print(LEAVE);
        if let Some(before) = &self.before {
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, before);
        }
    }
}

/// The keys that are pressed from now on; no more come when stdin ends.
pub fn keys(tried: &str) -> Outcome<UnboundedReceiver<u8>> {
    let (send, receive) = unbounded_channel();
    let read = move || {
        for key in std::io::stdin().lock().bytes().map_while(Result::ok) {
            if send.send(key).is_err() {
                return;
            }
        }
    };
    // It waits for a key as long as the process lives.
    let thread = std::thread::Builder::new().name("keys".into()).spawn(read);
    thread.map_err(|e| Failure::failed(tried, e))?;
    Ok(receive)
}

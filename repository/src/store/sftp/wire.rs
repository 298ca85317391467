//! SFTP version 3 (draft-ietf-secsh-filexfer-02) with the extensions of OpenSSH that a store needs:
//! requests to bytes and bytes to replies, no IO. Numbers are big endian.

use bytes::{Buf, Bytes};

/// The version that OpenSSH speaks.
const VERSION: u32 = 3;

/// OpenSSH sends and takes no longer message; memory for one is taken before it is read.
pub(super) const MESSAGE_BYTES_MAX: usize = 256 << 10;

/// What the draft lets every server take in one read or write, for one that names no limits.
pub(super) const DATA_BYTES: u32 = 32 << 10;

/// Creates a second name, which must be free: how an object becomes visible.
pub(super) const HARD_LINK: &str = "hardlink@openssh.com";
/// Makes a file durable.
pub(super) const SYNC: &str = "fsync@openssh.com";
/// Tells free space: the protocol has no code of its own for a full disk.
pub(super) const STAT_FS: &str = "statvfs@openssh.com";
/// Tells how much one read or write may carry.
pub(super) const LIMITS: &str = "limits@openssh.com";

/// The bits of a mode that tell what a file is.
const TYPE_MASK: u32 = 0o170_000;
const TYPE_REGULAR: u32 = 0o100_000;
const TYPE_DIRECTORY: u32 = 0o040_000;

const ATTR_SIZE: u32 = 1;
const ATTR_OWNER: u32 = 2;
const ATTR_PERMISSIONS: u32 = 4;
const ATTR_TIMES: u32 = 8;
const ATTR_EXTENDED: u32 = 0x8000_0000;

/// Which request a reply answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct RequestId(pub(super) u32);

/// The server's name for an open file or directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Handle(Bytes);

/// What a file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OpenFor {
    /// Reading; it must be there.
    Reading,
    /// Writing, with this mode; it must not be there.
    Creating { mode: u32 },
}

/// What is asked of a server.
#[derive(Debug)]
pub(super) enum Request<'a> {
    Open { path: &'a str, purpose: OpenFor },
    Close { handle: &'a Handle },
    Read { handle: &'a Handle, offset: u64, bytes: u32 },
    Write { handle: &'a Handle, offset: u64, data: &'a [u8] },
    Look { path: &'a str },
    OpenDirectory { path: &'a str },
    ReadDirectory { handle: &'a Handle },
    Remove { path: &'a str },
    MakeDirectory { path: &'a str, mode: u32 },
    HardLink { from: &'a str, to: &'a str },
    Sync { handle: &'a Handle },
    StatFs { path: &'a str },
    Limits,
}

/// The codes of the draft.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Code {
    Done,
    End,
    NoSuchFile,
    PermissionDenied,
    Unsupported,
    /// Everything else: the protocol does not tell a full disk from a name that is taken.
    Failure,
}

/// What a server says of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Attributes {
    pub(super) bytes: Option<u64>,
    mode: Option<u32>,
}

/// One line of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) name: Bytes,
    pub(super) attributes: Attributes,
}

/// What a server answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reply {
    Status { code: Code, text: String },
    Handle(Handle),
    Data(Bytes),
    Names(Vec<Named>),
    Attributes(Attributes),
    Extended(Bytes),
}

/// The extensions that a server has, from its first message.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Hello {
    extensions: Vec<(Bytes, Bytes)>,
}

/// A message of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Message {
    Hello(Hello),
    Reply(RequestId, Reply),
}

/// Bytes that are no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    #[error("a message ends early")]
    Short,
    #[error("it speaks version {0} of the protocol, not {VERSION}")]
    Version(u32),
    #[error("it sent a message of the unknown kind {0}")]
    Kind(u8),
}

/// Free space where a server keeps files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Space {
    pub(super) free_bytes: u64,
    pub(super) read_only: bool,
}

impl Attributes {
    pub(super) fn is_directory(self) -> bool {
        self.mode.is_some_and(|mode| mode & TYPE_MASK == TYPE_DIRECTORY)
    }

    /// A server that tells no mode is believed to show files.
    pub(super) fn is_regular(self) -> bool {
        self.mode.is_none_or(|mode| mode & TYPE_MASK == TYPE_REGULAR)
    }
}

impl Hello {
    /// Whether the server has an extension in the version that we speak.
    pub(super) fn has(&self, name: &str, version: &str) -> bool {
        let wanted = (name.as_bytes(), version.as_bytes());
        self.extensions.iter().any(|(name, version)| (&name[..], &version[..]) == wanted)
    }
}

/// The first message of a client.
pub(super) fn greeting() -> Vec<u8> {
    let mut message = Draft::new(1);
    message.number(VERSION);
    message.finish()
}

impl Request<'_> {
    /// The message with its length before it.
    pub(super) fn encode(&self, id: RequestId) -> Vec<u8> {
        let mut message = Draft::new(self.kind());
        message.number(id.0);
        match self {
            Self::Open { path, purpose: OpenFor::Reading } => {
                message.text(path).number(1).number(0);
            }
            Self::Open { path, purpose: OpenFor::Creating { mode } } => {
                // Write, create, fail if it is there.
                message.text(path).number(2 | 8 | 0x20).number(ATTR_PERMISSIONS).number(*mode);
            }
            Self::Close { handle } | Self::ReadDirectory { handle } => {
                message.bytes(&handle.0);
            }
            Self::Read { handle, offset, bytes } => {
                message.bytes(&handle.0).long(*offset).number(*bytes);
            }
            Self::Write { handle, offset, data } => {
                message.bytes(&handle.0).long(*offset).bytes(data);
            }
            Self::Look { path } | Self::OpenDirectory { path } | Self::Remove { path } => {
                message.text(path);
            }
            Self::MakeDirectory { path, mode } => {
                message.text(path).number(ATTR_PERMISSIONS).number(*mode);
            }
            Self::HardLink { from, to } => {
                message.text(HARD_LINK).text(from).text(to);
            }
            Self::Sync { handle } => {
                message.text(SYNC).bytes(&handle.0);
            }
            Self::StatFs { path } => {
                message.text(STAT_FS).text(path);
            }
            Self::Limits => {
                message.text(LIMITS);
            }
        }
        message.finish()
    }

    fn kind(&self) -> u8 {
        match self {
            Self::Open { .. } => 3,
            Self::Close { .. } => 4,
            Self::Read { .. } => 5,
            Self::Write { .. } => 6,
            Self::Look { .. } => 7,
            Self::OpenDirectory { .. } => 11,
            Self::ReadDirectory { .. } => 12,
            Self::Remove { .. } => 13,
            Self::MakeDirectory { .. } => 14,
            Self::HardLink { .. } | Self::Sync { .. } | Self::StatFs { .. } | Self::Limits => 200,
        }
    }
}

/// A message that is being written.
struct Draft(Vec<u8>);

impl Draft {
    fn new(kind: u8) -> Self {
        // Room for the length.
        Self(vec![0, 0, 0, 0, kind])
    }

    fn number(&mut self, number: u32) -> &mut Self {
        self.0.extend_from_slice(&number.to_be_bytes());
        self
    }

    fn long(&mut self, number: u64) -> &mut Self {
        self.0.extend_from_slice(&number.to_be_bytes());
        self
    }

    /// Names and data of ours are far shorter than a message may be.
    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.number(bytes.len() as u32);
        self.0.extend_from_slice(bytes);
        self
    }

    fn text(&mut self, text: &str) -> &mut Self {
        self.bytes(text.as_bytes())
    }

    fn finish(mut self) -> Vec<u8> {
        let length = (self.0.len() - 4) as u32;
        self.0[..4].copy_from_slice(&length.to_be_bytes());
        self.0
    }
}

impl Message {
    /// A message without its length.
    pub(super) fn parse(message: Bytes) -> Result<Self, Malformed> {
        let mut fields = Fields(message);
        let kind = fields.byte()?;
        if kind == 2 {
            return Ok(Self::Hello(fields.hello()?));
        }
        let id = RequestId(fields.number()?);
        let reply = match kind {
            101 => fields.status()?,
            102 => Reply::Handle(Handle(fields.bytes()?)),
            103 => Reply::Data(fields.bytes()?),
            104 => Reply::Names(fields.names()?),
            105 => Reply::Attributes(fields.attributes()?),
            201 => Reply::Extended(fields.0),
            other => return Err(Malformed::Kind(other)),
        };
        Ok(Self::Reply(id, reply))
    }
}

/// What is left of a message.
struct Fields(Bytes);

impl Fields {
    fn byte(&mut self) -> Result<u8, Malformed> {
        self.0.try_get_u8().map_err(|_| Malformed::Short)
    }

    fn number(&mut self) -> Result<u32, Malformed> {
        self.0.try_get_u32().map_err(|_| Malformed::Short)
    }

    fn long(&mut self) -> Result<u64, Malformed> {
        self.0.try_get_u64().map_err(|_| Malformed::Short)
    }

    fn bytes(&mut self) -> Result<Bytes, Malformed> {
        let length = usize::try_from(self.number()?).map_err(|_| Malformed::Short)?;
        if length > self.0.len() {
            return Err(Malformed::Short);
        }
        Ok(self.0.split_to(length))
    }

    fn hello(&mut self) -> Result<Hello, Malformed> {
        let version = self.number()?;
        if version != VERSION {
            return Err(Malformed::Version(version));
        }
        let mut extensions = Vec::new();
        while !self.0.is_empty() {
            extensions.push((self.bytes()?, self.bytes()?));
        }
        Ok(Hello { extensions })
    }

    fn status(&mut self) -> Result<Reply, Malformed> {
        let code = match self.number()? {
            0 => Code::Done,
            1 => Code::End,
            2 => Code::NoSuchFile,
            3 => Code::PermissionDenied,
            8 => Code::Unsupported,
            _ => Code::Failure,
        };
        // Some servers leave the text out.
        let text = self.bytes().unwrap_or_default();
        let text = String::from_utf8_lossy(&text).escape_debug().collect();
        Ok(Reply::Status { code, text })
    }

    fn names(&mut self) -> Result<Vec<Named>, Malformed> {
        let count = self.number()?;
        // Not taken at its word: each name takes bytes of the message.
        let mut names = Vec::new();
        for _ in 0..count {
            let name = self.bytes()?;
            self.bytes()?; // the line as `ls -l` would show it
            names.push(Named { name, attributes: self.attributes()? });
        }
        Ok(names)
    }

    fn attributes(&mut self) -> Result<Attributes, Malformed> {
        let flags = self.number()?;
        let has = |flag| flags & flag != 0;
        let mut found = Attributes::default();
        if has(ATTR_SIZE) {
            found.bytes = Some(self.long()?);
        }
        if has(ATTR_OWNER) {
            self.long()?;
        }
        if has(ATTR_PERMISSIONS) {
            found.mode = Some(self.number()?);
        }
        if has(ATTR_TIMES) {
            self.long()?;
        }
        if has(ATTR_EXTENDED) {
            for _ in 0..self.number()? {
                self.bytes()?;
                self.bytes()?;
            }
        }
        Ok(found)
    }
}

/// The answer to [`Request::StatFs`].
pub(super) fn space(answer: Bytes) -> Result<Space, Malformed> {
    let mut fields = Fields(answer);
    let mut numbers = [0; 11];
    for number in &mut numbers {
        *number = fields.long()?;
    }
    // bsize, frsize, blocks, bfree, bavail, files, ffree, favail, fsid, flag, namemax
    let [_, fragment, _, _, available, files, _, free_files, _, flags, _] = numbers;
    // Some file systems count no files at all.
    let no_names = files > 0 && free_files == 0;
    let free_bytes = if no_names { 0 } else { fragment.saturating_mul(available) };
    Ok(Space { free_bytes, read_only: flags & 1 != 0 })
}

/// The answer to [`Request::Limits`]: the most that one read and one write may carry.
pub(super) fn limits(answer: Bytes) -> Result<(u32, u32), Malformed> {
    let mut fields = Fields(answer);
    fields.long()?; // the longest message
    let (read, write) = (fields.long()?, fields.long()?);
    // What a message of ours could carry beside its header.
    let most = (MESSAGE_BYTES_MAX - 1024) as u64;
    let usable = |limit: u64| match limit {
        0 => DATA_BYTES, // it names none
        _ => u32::try_from(limit.min(most)).unwrap_or(DATA_BYTES),
    };
    Ok((usable(read), usable(write)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(text: &str) -> Vec<u8> {
        let length = u32::try_from(text.len()).unwrap();
        [&length.to_be_bytes()[..], text.as_bytes()].concat()
    }

    fn parse(parts: &[&[u8]]) -> Result<Message, Malformed> {
        Message::parse(Bytes::from(parts.concat()))
    }

    #[test]
    fn requests_are_as_the_draft_has_them() {
        assert_eq!(greeting(), [0, 0, 0, 5, 1, 0, 0, 0, 3]);
        let handle = Handle(Bytes::from_static(b"h"));
        let read = Request::Read { handle: &handle, offset: 258, bytes: 9 };
        let expected = [
            &[0, 0, 0, 22, 5, 0, 0, 0, 7, 0, 0, 0, 1][..],
            b"h",
            &[0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 9],
        ];
        assert_eq!(read.encode(RequestId(7)), expected.concat());
        let purpose = OpenFor::Creating { mode: 0o600 };
        let open = Request::Open { path: "ab", purpose };
        let expected = [
            &[0, 0, 0, 23, 3, 0, 0, 0, 1, 0, 0, 0, 2][..],
            b"ab",
            &[0, 0, 0, 0x2a, 0, 0, 0, 4, 0, 0, 1, 0x80],
        ];
        assert_eq!(open.encode(RequestId(1)), expected.concat());
        let link = Request::HardLink { from: "a", to: "b" }.encode(RequestId(2));
        assert_eq!(link[9..], [text(HARD_LINK), text("a"), text("b")].concat());
    }

    #[test]
    fn replies_are_understood() {
        let hello = parse(&[&[2, 0, 0, 0, 3], &text(SYNC), &text("1")]).unwrap();
        let Message::Hello(hello) = hello else { panic!("{hello:?}") };
        assert!(hello.has(SYNC, "1") && !hello.has(SYNC, "2") && !hello.has(HARD_LINK, "1"));
        assert_eq!(parse(&[&[2, 0, 0, 0, 4]]), Err(Malformed::Version(4)));
        let status = parse(&[&[101, 0, 0, 0, 9, 0, 0, 0, 2], &text("no\x1b"), &text("en")]);
        let text_of = Reply::Status { code: Code::NoSuchFile, text: "no\\u{1b}".into() };
        assert_eq!(status, Ok(Message::Reply(RequestId(9), text_of)));
        let bare = parse(&[&[101, 0, 0, 0, 9, 0, 0, 0, 99]]).unwrap();
        let failure = Reply::Status { code: Code::Failure, text: String::new() };
        assert_eq!(bare, Message::Reply(RequestId(9), failure));
        let attributes = [0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0x41, 0xc0];
        let listed = parse(&[
            &[104, 0, 0, 0, 1, 0, 0, 0, 1],
            &text("x"),
            &text("drwx x"),
            &[0, 0, 0, 5],
            &attributes,
        ]);
        let Ok(Message::Reply(_, Reply::Names(names))) = listed else { panic!("{listed:?}") };
        assert_eq!(names[0].attributes.bytes, Some(5));
        assert!(names[0].attributes.is_directory() && !names[0].attributes.is_regular());
    }

    #[test]
    fn limits_are_never_more_than_a_message_carries() {
        let answer = |read: u64, write: u64| {
            let numbers = [1 << 40, read, write, 10].map(u64::to_be_bytes);
            limits(Bytes::from(numbers.concat())).unwrap()
        };
        assert_eq!(answer(0, 1000), (DATA_BYTES, 1000));
        let (read, _) = answer(u64::MAX, 1);
        assert!(u64::from(read) < MESSAGE_BYTES_MAX as u64);
    }

    proptest! {
        #[test]
        fn no_message_panics_or_is_believed_beyond_its_bytes(bytes: Vec<u8>, kind in 0u8..=255) {
            let message = [&[kind][..], &bytes].concat();
            if let Ok(Message::Reply(_, Reply::Names(names))) = Message::parse(message.into()) {
                prop_assert!(names.len() <= bytes.len());
            }
            let _ = (space(bytes.clone().into()), limits(bytes.into()));
        }

        #[test]
        fn data_and_handles_come_back_as_they_were_sent(id: u32, data: Vec<u8>) {
            let length = u32::try_from(data.len()).unwrap().to_be_bytes();
            let reply = |kind: u8| parse(&[&[kind], &id.to_be_bytes(), &length, &data]);
            let data = Bytes::from(data.clone());
            let expected = Message::Reply(RequestId(id), Reply::Data(data.clone()));
            prop_assert_eq!(reply(103), Ok(expected));
            let expected = Message::Reply(RequestId(id), Reply::Handle(Handle(data)));
            prop_assert_eq!(reply(102), Ok(expected));
        }

        #[test]
        fn the_length_before_a_request_is_that_of_the_rest(path in "\\PC*", data: Vec<u8>) {
            let handle = Handle(Bytes::from(data.clone()));
            for request in [
                Request::Look { path: &path },
                Request::MakeDirectory { path: &path, mode: 0o700 },
                Request::Write { handle: &handle, offset: 1, data: &data },
                Request::Sync { handle: &handle },
                Request::StatFs { path: &path },
            ] {
                let message = request.encode(RequestId(3));
                let length = u32::from_be_bytes(message[..4].try_into().unwrap());
                prop_assert_eq!(length as usize, message.len() - 4);
            }
        }
    }
}

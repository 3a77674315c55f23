//! Control tokens in chats.

//! Streams, their log, and the append.

mod append;
mod append_next;
mod catalogue;
mod ids;
mod keys;
mod leaf;
mod log;
mod scheduled;
mod schedules;
mod session;

pub use append::{
    Append, AppendMessage, AppendOutcome, Appended, GroupKey, RelayMember, Seen, TOPICS_MAX,
    append, intern_topics,
};
pub use append_next::{Previous, append_next};
pub use catalogue::{
    Catalogue, DeclareOutcome, DeleteOutcome, STREAMS_MAX, StreamRow, create_main, declare, delete,
    load_catalogue, read_leaf_sizes, read_sizes,
};
pub use ids::{ScheduledName, find_topics, read_ids, read_scheduled_ids};
pub use keys::{
    KeyHead, fetch_items, find_key_head, find_span_end, fold_keys, list_key_heads, read_key_slice,
    read_keys,
};
pub use leaf::{
    Emptied, EmptyLeaf, Leaf, correct_leaves, drop_leaf, drop_stream_log, empty_leaf, extend_log,
    list_leaves, list_orphans, note_clocks, rotate_buckets, summarise_leaf,
};
pub use log::{
    AttributesRow, Head, MatchRange, Row, Slice, SliceItem, are_dense, fetch_attributes,
    fetch_entries, find_head, list_heads, list_match_ranges, list_topics, read_appended_at,
    read_slice, read_top,
};
pub use scheduled::*;
pub use schedules::*;
pub use session::{
    connect_appender, connect_catalogue, connect_duty, connect_reader, connect_shared_reader,
    connect_tail,
};

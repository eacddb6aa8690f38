//! Whole data sets: rows in, three flat arrays of ids and a tally out. The result does not depend on the threads.

mod desk;
mod feed;
mod files;
mod job;
mod outcome;
mod rows;

pub use desk::PIECE_ROWS;
pub use feed::{Feed, Offer};
pub use files::{FileEncoder, encode_files, scan_files};
pub use job::{Job, OnBad, Progress};
pub use outcome::{Count, Encoded, Ragged, Tally};
pub use rows::{Columns, Fields, encode_columns, encode_fed};

//! The kinds of problem that the API returns (RFC 9457). The broker and its client know them by this one list.

/// Calls a macro with the list of all kinds, each as `/// doc` `Name = "slug", status, "title";`.
#[doc(hidden)]
#[macro_export]
macro_rules! problem_kinds {
    ($then:ident) => {
        $then! {
            /// The request's JSON or encoding cannot be read.
            MalformedRequest = "malformed-request", 400, "The request cannot be read";
            /// A browser sent the request for a page of another site.
            CrossSite = "cross-site", 403, "Pages of other sites may not send requests";
            /// The request names a host that is not this broker's.
            HostNotAllowed = "host-not-allowed", 403, "The request's host name is not allowed";
            /// No such path.
            NotFound = "not-found", 404, "There is nothing at this path";
            /// No such stream.
            StreamNotFound = "stream-not-found", 404, "There is no such stream";
            /// No such queue.
            QueueNotFound = "queue-not-found", 404, "There is no such queue";
            /// No such message, or not the queue's.
            QueueMessageNotFound = "queue-message-not-found", 404, "There is no such message in the queue";
            /// No settings for the topics.
            TopicSettingsNotFound = "topic-settings-not-found", 404, "No settings are declared for this pattern";
            /// No such origin.
            OriginNotFound = "origin-not-found", 404, "There is no such origin";
            /// No such rejected row.
            RejectedMessageNotFound = "rejected-message-not-found", 404, "There is no such rejected message";
            /// No such dead letter.
            DeadLetterNotFound = "dead-letter-not-found", 404, "There is no such dead letter";
            /// No such redrive.
            RedriveNotFound = "redrive-not-found", 404, "There is no such redrive";
            /// No such scheduled message.
            ScheduledMessageNotFound = "scheduled-message-not-found", 404, "There is no such scheduled message";
            /// A lock that nobody holds or held lately.
            LockNotFound = "lock-not-found", 404, "Nobody holds the lock";
            /// No such schedule.
            ScheduleNotFound = "schedule-not-found", 404, "There is no such schedule";
            /// The path does not take the method.
            MethodNotAllowed = "method-not-allowed", 405, "The method is not allowed here";
            /// The body did not come in time.
            RequestTimeout = "request-timeout", 408, "The request took too long to arrive";
            /// An id stands for another message.
            IdConflict = "id-conflict", 409, "An id was already used for another message";
            /// A message expects another version of its key.
            VersionConflict = "version-conflict", 409, "The key is at another version";
            /// Only keyed streams have versions and keys.
            StreamNotKeyed = "stream-not-keyed", 409, "The stream is not keyed";
            /// A stream that has had messages cannot become keyed, or stop being keyed.
            StreamKeyedFixed = "stream-keyed-fixed", 409, "The stream's `keyed` setting cannot be changed";
            /// Patterns of two streams overlap.
            StreamOverlap = "stream-overlap", 409, "The topics belong to another stream";
            /// The stream has queues.
            StreamHasQueues = "stream-has-queues", 409, "The stream still has queues";
            /// The stream `main` cannot be deleted.
            StreamIsKept = "stream-is-kept", 409, "This stream cannot be deleted";
            /// A queue's stream is fixed.
            QueueStreamFixed = "queue-stream-fixed", 409, "The stream of a queue cannot be changed";
            /// A seek or purge expects another generation.
            GenerationMoved = "generation-moved", 409, "The queue is in another generation";
            /// The log is older than the queue's state.
            LogBehindQueue = "log-behind-queue", 409, "The log is older than the queue's state";
            /// No more queues are allowed.
            TooManyQueues = "too-many-queues", 409, "The queue limit is reached";
            /// No more patterns may have settings.
            TooManyTopicSettings = "too-many-topic-settings", 409, "The limit of topic settings is reached";
            /// The rejected row cannot be resent.
            NotResendable = "not-resendable", 409, "The rejected message cannot be resent";
            /// The letter's message is in the queue again.
            DeadLetterRedriven = "dead-letter-redriven", 409, "The dead letter has been redriven";
            /// A scheduled message can no longer be cancelled.
            AlreadyPublished = "already-published", 409, "The message has already been published";
            /// Another owner holds the lock.
            LockHeld = "lock-held", 409, "Another owner holds the lock";
            /// A renewal came too late.
            LockLost = "lock-lost", 409, "The lock is no longer held under this token";
            /// The stream still has scheduled messages.
            StreamHasScheduled = "stream-has-scheduled", 409, "The stream still has scheduled messages";
            /// No more streams are allowed.
            TooManyStreams = "too-many-streams", 409, "The stream limit is reached";
            /// No more topics are allowed.
            TooManyTopics = "too-many-topics", 409, "The topic limit is reached";
            /// No more schedules are allowed.
            TooManySchedules = "too-many-schedules", 409, "The schedule limit is reached";
            /// Retention has dropped messages that the request asks for.
            OffsetGone = "offset-gone", 410, "The requested messages are gone";
            /// The body is too large.
            PayloadTooLarge = "payload-too-large", 413, "The request is too large";
            /// One message is too large.
            MessageTooLarge = "message-too-large", 413, "A message is too large";
            /// A content type that the path does not take.
            UnsupportedMediaType = "unsupported-media-type", 415, "The content type is not supported";
            /// Another node passed the request on, and this node does not own the queue. Only nodes get this answer.
            MisdirectedRequest = "misdirected-request", 421, "This node does not own the queue";
            /// Fields, parameters or names break rules.
            InvalidRequest = "invalid-request", 422, "The request is not valid";
            /// Messages break rules.
            InvalidMessage = "invalid-message", 422, "A message is not valid";
            /// Payloads do not match the topic's schema.
            SchemaMismatch = "schema-mismatch", 422, "A message does not match the schema of its topic";
            /// The topic's rate is used up.
            RateLimited = "rate-limited", 429, "The topic's rate limit is reached";
            /// Too much is in progress, or waits.
            TooManyRequests = "too-many-requests", 429, "Too much work is in progress";
            /// The broker has a defect.
            Internal = "internal", 500, "The broker failed";
            /// The body comes in an unsupported transfer coding.
            TransferEncoding = "transfer-encoding", 501, "The body's transfer coding is not supported";
            /// The database or the queue's owner cannot be reached.
            Unavailable = "unavailable", 503, "The broker cannot do this at the moment";
            /// The write may or may not have happened.
            OutcomeUnknown = "outcome-unknown", 503, "The outcome is not known";
            /// Nobody owns the queue at the moment.
            NoOwner = "no-owner", 503, "The queue has no owner at the moment";
            /// There is no memory or connection for the request or its answer at the moment.
            Overloaded = "overloaded", 503, "The broker is at capacity";
            /// The process stops.
            Stopping = "stopping", 503, "The broker is stopping";
        }
    };
}

pub use problem_kinds;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $slug:literal, $status:literal, $title:literal;)*) => {
        /// The kinds of problem.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Kind {
            $($(#[$doc])* $name,)*
        }

        impl Kind {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The last part of the `type`.
            #[must_use]
            pub const fn slug(self) -> &'static str {
                match self { $(Self::$name => $slug,)* }
            }

            /// The HTTP status.
            #[must_use]
            pub const fn status(self) -> u16 {
                match self { $(Self::$name => $status,)* }
            }

            /// The title, the same for all of this kind.
            #[must_use]
            pub const fn title(self) -> &'static str {
                match self { $(Self::$name => $title,)* }
            }
        }
    };
}

problem_kinds!(kinds);

impl Kind {
    /// The `type`.
    #[must_use]
    pub fn uri(self) -> String {
        format!("/problems/{}", self.slug())
    }
}

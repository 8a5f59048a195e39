//! Gives errors and recordings of derived services a serde form, with the feature `serde`.
//!
//! An error is written as its variants are named, with texts as strings. What a later version adds
//! is an error where it is read.

use serde::de::{Deserialize, Deserializer};
use serde::ser::{Serialize, Serializer};

use crate::error::{Cycle, FetchReason, PanicMessage, Reason, SendReason, TenoriteError, TooLarge};
use crate::testing::{Exchange, Outcome};

/// A definition that serde derives from, for a type that is defined where serde is not known.
macro_rules! forms {
    ($($real:ident $(<$($parameter:ident),+>)? as $form:ident: { $($body:tt)* })+) => { $(
        #[derive(serde::Serialize, serde::Deserialize)]
        $($body)*

        impl $(<$($parameter: Serialize),+>)? Serialize for $real $(<$($parameter),+>)? {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                $form::serialize(self, serializer)
            }
        }

        impl<'de $(, $($parameter: Deserialize<'de>),+)?> Deserialize<'de> for $real $(<$($parameter),+>)? {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $form::deserialize(deserializer)
            }
        }
    )+ };
}

forms! {
    SendReason as SendReasonForm: {
        #[serde(remote = "SendReason")]
        enum SendReasonForm {
            Stopped,
            Full,
            Expired,
            StartFailed(Reason),
            WouldDeadlock(Cycle),
            NoService,
            Disconnected,
            TooLarge(TooLarge),
            Incompatible(Reason),
            Denied(Reason),
        }
    }
    FetchReason as FetchReasonForm: {
        #[serde(remote = "FetchReason")]
        enum FetchReasonForm {
            Panicked(PanicMessage),
            Stopped,
            Expired,
            Unanswered,
            Mismatched,
            Disconnected,
            TooLarge(TooLarge),
            Undecodable(Reason),
        }
    }
    TooLarge as TooLargeForm: {
        #[serde(remote = "TooLarge")]
        struct TooLargeForm {
            size: usize,
            limit: usize,
        }
    }
    Outcome<Rs> as OutcomeForm: {
        #[serde(remote = "Outcome")]
        enum OutcomeForm<Rs> {
            Replied(Rs),
            Accepted,
            Failed(TenoriteError),
        }
    }
    Exchange<Rq, Rs> as ExchangeForm: {
        #[serde(remote = "Exchange")]
        #[serde(bound(serialize = "Rq: Serialize, Rs: Serialize"))]
        #[serde(bound(deserialize = "Rq: Deserialize<'de>, Rs: Deserialize<'de>"))]
        struct ExchangeForm<Rq, Rs> {
            request: Rq,
            outcome: Outcome<Rs>,
        }
    }
}

// A derive would want a form of `Infallible`, which has none.
impl Serialize for TenoriteError {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let name = "TenoriteError";
        match self {
            Self::SendFailure(reason) => serializer.serialize_newtype_variant(name, 0, "SendFailure", reason),
            Self::FetchFailure(reason) => {
                serializer.serialize_newtype_variant(name, 1, "FetchFailure", reason)
            }
            Self::ServiceError(never) => match *never {},
        }
    }
}

impl<'de> Deserialize<'de> for TenoriteError {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        #[serde(rename = "TenoriteError")]
        enum Form {
            SendFailure(SendReason),
            FetchFailure(FetchReason),
        }
        Ok(match Form::deserialize(deserializer)? {
            Form::SendFailure(reason) => Self::SendFailure(reason),
            Form::FetchFailure(reason) => Self::FetchFailure(reason),
        })
    }
}

macro_rules! texts {
    ($($text:ident)+) => { $(
        impl Serialize for $text {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> Deserialize<'de> for $text {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer).map(Self::from)
            }
        }
    )+ };
}

texts!(Reason PanicMessage);

impl Serialize for Cycle {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.hops())
    }
}

impl<'de> Deserialize<'de> for Cycle {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Vec::<(String, String)>::deserialize(deserializer).map(|hops| hops.into_iter().collect())
    }
}

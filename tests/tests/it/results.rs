//! Return types: what is a `Result` is found without being told, whatever it is called.

// Types are written with and without their paths on purpose.
#![allow(unused_qualifications)]

use std::fmt;
use std::io;

use tenorite::prelude::*;

#[derive(Debug, PartialEq, Eq)]
pub struct Oops;

impl fmt::Display for Oops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("oops")
    }
}

impl std::error::Error for Oops {}

type OopsResult<T> = Result<T, Oops>;
/// Called like a `Result`, and none.
#[derive(Debug, PartialEq, Eq)]
pub struct SearchResult(pub u8);
pub type UnitResult = Result<(), Oops>;

struct Answers;

#[tenorite::service]
impl Answers {
    pub fn written(&self, ok: bool) -> Result<u8, Oops> {
        if ok { Ok(1) } else { Err(Oops) }
    }
    pub fn full_path(&self) -> std::result::Result<u8, Oops> {
        Err(Oops)
    }
    pub fn io(&self) -> io::Result<u8> {
        Err(io::Error::other("io"))
    }
    pub fn alias(&self) -> OopsResult<u8> {
        Err(Oops)
    }
    pub fn unit_alias(&self) -> UnitResult {
        Err(Oops)
    }
    pub fn plain(&self) -> SearchResult {
        SearchResult(2)
    }
    pub async fn fmt(&self) -> fmt::Result {
        tokio::task::yield_now().await;
        Err(fmt::Error)
    }
    pub fn nested(&self) -> Option<Result<u8, Oops>> {
        Some(Err(Oops))
    }
    pub fn result_of_result(&self) -> Result<Result<u8, Oops>, io::ErrorKind> {
        Ok(Err(Oops))
    }
    pub fn me(&self) -> Result<Self, Oops> {
        Ok(Self)
    }
    pub fn me_plain(&self) -> Self {
        Self
    }
    pub fn array(&self) -> [u8; Self::LENGTH] {
        [7; Self::LENGTH]
    }
    pub fn boxed(&self) -> Box<dyn Fn(&str) -> usize + Send> {
        Box::new(str::len)
    }
    const LENGTH: usize = 3;
}

#[tokio::test]
async fn a_result_is_found_through_its_names() {
    let (_task, answers) = AnswersService.start_task(32, Answers);
    let oops = || Err(TenoriteError::ServiceError(Oops));
    assert_eq!(answers.written(true).await, Ok(1));
    assert_eq!(answers.written(false).await, oops());
    assert_eq!(answers.full_path().await, oops());
    match answers.io().await {
        Err(TenoriteError::ServiceError(error)) => assert_eq!(error.to_string(), "io"),
        other => panic!("{other:?}"),
    }
    assert_eq!(answers.alias().await, oops());
    let unit: Result<(), TenoriteError<Oops>> = answers.unit_alias().await;
    assert_eq!(unit, Err(TenoriteError::ServiceError(Oops)));
    let plain: Result<SearchResult, TenoriteError> = answers.plain().await;
    assert_eq!(plain, Ok(SearchResult(2)));
    assert_eq!(answers.fmt().await, Err(TenoriteError::ServiceError(fmt::Error)));
    assert_eq!(answers.nested().await, Ok(Some(Err(Oops))));
    assert_eq!(answers.result_of_result().await, Ok(Err(Oops)));
    assert!(answers.me().await.is_ok() && answers.me_plain().await.is_ok());
    assert_eq!(answers.array().await, Ok([7; 3]));
    assert_eq!(answers.boxed().await.map(|length| length("four")).unwrap(), 4);
}

#[tokio::test]
async fn responses_hold_what_the_method_returns() {
    let (_task, answers) = AnswersService.start_task(32, Answers);
    let ask = |request| answers.send_request(request);
    assert!(matches!(
        ask(AnswersRequest::Written { ok: false }).await,
        Ok(AnswersResponse::Written(Err(Oops)))
    ));
    assert!(matches!(ask(AnswersRequest::Alias).await, Ok(AnswersResponse::Alias(Err(Oops)))));
    assert!(matches!(ask(AnswersRequest::Plain).await, Ok(AnswersResponse::Plain(SearchResult(2)))));
}

mod question {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Mine {
        #[error(transparent)]
        Oops(#[from] TenoriteError<Oops>),
        #[error(transparent)]
        Other(#[from] TenoriteError),
    }

    #[tokio::test]
    async fn marks_just_work() {
        async fn all(answers: &AnswersCaller) -> Result<u8, Mine> {
            let SearchResult(plain) = answers.plain().await?;
            Ok(plain + answers.written(true).await? + answers.alias().await?)
        }
        let (_task, answers) = AnswersService.start_task(32, Answers);
        assert!(matches!(all(&answers).await, Err(Mine::Oops(TenoriteError::ServiceError(Oops)))));
    }
}

//! Generic workers: derived types carry only the parameters that their fields name.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;
use std::marker::PhantomData;

use tenorite::prelude::*;

pub trait Storage: Send + 'static {
    type Error: std::error::Error + Send + 'static;
    fn load(&self, key: &str) -> Option<String>;
    fn save(&mut self, key: String, value: String) -> Result<(), Self::Error>;
}

#[derive(Default)]
struct Memory(HashMap<String, String>);

impl Storage for Memory {
    type Error = std::convert::Infallible;
    fn load(&self, key: &str) -> Option<String> {
        self.0.get(key).cloned()
    }
    fn save(&mut self, key: String, value: String) -> Result<(), Self::Error> {
        self.0.insert(key, value);
        Ok(())
    }
}

struct Cache<S> {
    storage: S,
}

#[tenorite::service]
impl<S: Storage> Cache<S> {
    pub fn get(&self, key: &str) -> Option<String> {
        self.storage.load(key)
    }
    pub async fn set(&mut self, key: String, value: String) -> bool {
        tokio::task::yield_now().await;
        self.storage.save(key, value).is_ok()
    }
}

#[tokio::test]
async fn callers_do_not_care_where_it_is_stored() {
    let (task, cache): (_, CacheCaller) = CacheService.start_task(32, Cache { storage: Memory::default() });
    assert_eq!(cache.set("a", "b").await, Ok(true));
    assert_eq!(cache.get("a").await, Ok(Some("b".to_owned())));
    let _: CacheRequest = CacheRequest::Get { key: "a".to_owned() };
    drop(cache);
    assert_eq!(task.await.unwrap().storage.0.len(), 1);
    let (_task, cache) = CacheService.builder().start_task(1, Cache { storage: Memory::default() });
    assert_eq!(cache.get("a").await, Ok(None));
}

/// Names one parameter in the requests, another in the responses, a third nowhere.
struct Table<K, V, H> {
    rows: HashMap<K, V>,
    hasher: PhantomData<H>,
}

#[tenorite::service]
impl<K, V, H> Table<K, V, H>
where
    K: Hash + Eq + Send + 'static,
    V: Clone + Send + 'static,
    H: Send + 'static,
{
    pub fn row(&self, key: &K) -> Option<V> {
        self.rows.get(key).cloned()
    }
    pub fn rows(&self, keys: &[K]) -> Vec<Option<V>> {
        keys.iter().map(|key| self.rows.get(key).cloned()).collect()
    }
    pub fn len(&self) -> usize {
        self.rows.len()
    }
}

#[tokio::test]
async fn each_type_has_the_parameters_that_it_names() {
    let rows = HashMap::from([(1_u8, "one")]);
    let (_task, table) = TableService.start_task(8, Table { rows, hasher: PhantomData::<()> });
    let _: &TableCaller<u8, &'static str> = &table;
    assert_eq!(table.row(1).await, Ok(Some("one")));
    assert_eq!(table.rows([1, 2]).await, Ok(vec![Some("one"), None]));
    let request: TableRequest<u8> = TableRequest::Row { key: 1 };
    assert_eq!(format!("{request:?}"), "Row { key: .. }", "nothing is known of a bare parameter");
    let response: TableResponse<&str> = table.send_request(request).await.unwrap();
    assert!(matches!(response, TableResponse::Row(Some("one"))));
    let mock = TableCaller::<u8, u8>::from_fn(|_| async { Ok(TableResponse::Len(3)) });
    assert_eq!(mock.len().await, Ok(3));
    assert!(mock.with_timeout(std::time::Duration::from_secs(1)).downgrade().upgrade().is_some());
}

/// Parameters called like those that derived items have of their own.
struct Names<T, E, F, Fut> {
    value: (T, E, F, Fut),
}

#[tenorite::service]
impl<T, E, F, Fut> Names<T, E, F, Fut>
where
    T: Clone + Send + 'static,
    E: Clone + Send + 'static,
    F: Clone + Send + 'static,
    Fut: Clone + Send + 'static,
{
    pub fn all(&self, t: T, e: E, f: F, fut: Fut) -> (T, E, F, Fut) {
        let _ = &self.value;
        (t, e, f, fut)
    }
    pub fn fallible(&self, fail: Option<E>) -> Result<T, E> {
        fail.map_or_else(|| Ok(self.value.0.clone()), Err)
    }
}

#[tokio::test]
async fn parameters_of_any_name() {
    let (_task, names) = NamesService.start_task(1, Names { value: (1_u8, 2_u16, 3_u32, 4_u64) });
    assert_eq!(names.all(5, 6, 7, 8).await, Ok((5, 6, 7, 8)));
    assert_eq!(names.fallible(None).await, Ok(1));
    assert_eq!(names.fallible(Some(9)).await, Err(TenoriteError::ServiceError(9)));
    drop::<NamesCall<'_, u8, u16, u32, u64, u8, u16>>(names.fallible(None));
}

/// Associated types, constants, aliases of `Result` and `Self`, all of them generic.
struct Ring<S: Storage, const N: usize> {
    storage: S,
    slots: [u8; N],
}

mod aliased {
    pub type Result<T> = std::result::Result<T, super::Full>;
}

#[derive(Debug, PartialEq, Eq)]
pub struct Full;

#[tenorite::service]
impl<S: Storage + Clone, const N: usize> Ring<S, N> {
    pub fn slots(&self) -> [u8; N] {
        self.slots
    }
    pub fn fill(&mut self, slots: &[u8; N]) -> aliased::Result<Option<[u8; N]>> {
        if self.slots == *slots {
            return Err(Full);
        }
        Ok(Some(std::mem::replace(&mut self.slots, *slots)))
    }
    pub fn save(&mut self, key: &str) -> Result<(), S::Error> {
        self.storage.save(key.to_owned(), String::new())
    }
    pub fn copy(&self) -> Option<Self> {
        Some(Self { storage: self.storage.clone(), slots: self.slots })
    }
}

#[derive(Clone, Debug)]
struct Broken;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("broken")]
struct BrokenError;

impl Storage for Broken {
    type Error = BrokenError;
    fn load(&self, _: &str) -> Option<String> {
        None
    }
    fn save(&mut self, _: String, _: String) -> Result<(), BrokenError> {
        Err(BrokenError)
    }
}

#[tokio::test]
async fn associated_types_constants_and_self() {
    let (_task, ring) = RingService.start_task(4, Ring { storage: Broken, slots: [0; 2] });
    assert_eq!(ring.slots().await, Ok([0; 2]));
    assert_eq!(ring.fill([1, 2]).await, Ok(Some([0, 0])));
    assert_eq!(ring.fill([1, 2]).await, Err(TenoriteError::ServiceError(Full)));
    assert_eq!(ring.save("key").await, Err(TenoriteError::ServiceError(BrokenError)));
    assert_eq!(ring.copy().await.unwrap().unwrap().slots, [1, 2]);
}

/// A concrete worker of a generic struct, under a name of its own.
struct Tally<T>(T);

#[tenorite::service(name = "Bytes")]
impl Tally<Vec<u8>> {
    pub fn total(&self) -> usize {
        self.0.len()
    }
}

#[tenorite::service(name = "Text")]
impl Tally<String> {
    pub fn total(&self) -> usize {
        self.0.chars().count()
    }
}

#[tokio::test]
async fn two_services_of_one_struct() {
    let (_task, bytes) = BytesService.start_task(1, Tally(vec![1, 2]));
    let (_task, text) = TextService.start_task(1, Tally("x".to_owned()));
    assert_eq!((bytes.total().await, text.total().await), (Ok(2), Ok(1)));
}

mod bounds {
    use super::*;

    #[tokio::test]
    async fn one_generic_function_for_every_caller() {
        async fn show<Rq, Rs, C>(caller: C, request: Rq) -> String
        where
            Rq: Send + 'static,
            Rs: Debug + Send + 'static,
            C: Caller<Request = Rq, Response = Rs, Error = std::convert::Infallible>,
        {
            match caller.as_ref().send_request(request).await {
                Ok(response) => format!("{response:?}"),
                Err(error) => error.to_string(),
            }
        }
        let (_task, cache) = CacheService.start_task(1, Cache { storage: Memory::default() });
        assert_eq!(show(cache, CacheRequest::Get { key: "x".to_owned() }).await, "Get(None)");
    }
}

//! Attributes that a user puts on what is derived, and what is derived in turn.

use tenorite::prelude::*;

struct Shop;

#[tenorite::service(
    serde,
    derive(Clone, PartialEq),
    request(serde(rename_all = "kebab-case"), non_exhaustive),
    response(serde(untagged))
)]
impl Shop {
    #[service(request(serde(rename = "PAY"), doc(alias = "money")), response(serde(skip)))]
    pub fn pay_in(&mut self, #[service(request(serde(default)))] cents: u64, to: &str) -> usize {
        to.len() + usize::try_from(cents).unwrap()
    }

    pub fn close_shop(&mut self) -> bool {
        true
    }
}

/// As with any type of one's own: for wire formats and schemas, on enums, variants and fields.
#[test]
fn attributes_reach_the_enums_their_variants_and_fields() {
    let paid: ShopRequest = serde_json::from_str(r#"{"PAY":{"to":"a"}}"#).unwrap();
    assert!(paid == ShopRequest::PayIn { cents: 0, to: "a".to_owned() });
    assert_eq!(serde_json::to_string(&ShopRequest::CloseShop).unwrap(), r#""close-shop""#);
    assert_eq!(serde_json::to_string(&ShopResponse::CloseShop(true)).unwrap(), "true");
    assert!(serde_json::to_string(&ShopResponse::PayIn(1)).is_err());
    assert_eq!((Shop.pay_in(1, "a"), Shop.close_shop()), (2, true));
}

/// The visibility of a method is that of the caller's method. A request is data: code that can name
/// its type can make it.
mod bank {
    pub struct Bank(pub u64);

    #[tenorite::service(serde)]
    impl Bank {
        pub fn balance(&self) -> u64 {
            self.0
        }

        pub(in crate::attributes::bank) fn mint(&mut self, cents: u64) -> u64 {
            self.0 += cents;
            self.0
        }
    }

    pub async fn mint(bank: &BankCaller) -> u64 {
        bank.mint(1).await.unwrap()
    }
}

#[tokio::test]
async fn a_less_visible_method_is_a_request_like_any_other() {
    use bank::{BankRequest, BankResponse};

    let bank = bank::BankService.start(4, bank::Bank(0));
    assert_eq!(bank::mint(&bank).await, 1);
    // `bank.mint(1)` does not compile here, and this does.
    let minted = bank.send_request(BankRequest::Mint { cents: 1 }).await;
    assert!(matches!(minted, Ok(BankResponse::Mint(2))));
    // Also for what comes from another machine.
    let request: BankRequest = serde_json::from_str(r#"{"Mint":{"cents":3}}"#).unwrap();
    bank.send_request(request).await.unwrap();
    assert_eq!(bank.balance().await, Ok(5));
}

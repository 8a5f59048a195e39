use tenorite::prelude::*;

fn takes<C: Caller>(_: C) {}

fn main() {
    takes(1_u8);
}

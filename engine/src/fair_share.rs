//! Who has been served how much: among waiting sequences of equal priority, the tenant served least goes first.
//!
//! Virtual token counters (Sheng et al. 2024, "Fairness in Serving Large Language Models", arXiv:2401.00588): each
//! tenant has a counter of the tokens it was served, a generated one counting twice a prompt's. A tenant that comes
//! back after having had nothing to do is lifted to the least of those present, so that idle time cannot be saved up;
//! between tenants that always have work waiting, counters never differ by more than what one step and one request
//! can add.

use std::collections::BTreeMap;

use crate::sequence::Tenant;

/// A generated token's price; a prompt token's is 1.
pub const GENERATED_TOKEN_PRICE: u64 = 2;

/// Absent tenants remembered; of more, those served least are forgotten, which costs the others the least.
const ABSENT_MAX: usize = 1024;

#[derive(Debug, Clone, Copy, Default)]
struct Account {
    served: u64,
    /// Its sequences, waiting or running.
    sequences: usize,
}

/// The counters of all tenants.
#[derive(Debug, Default)]
pub struct FairShare {
    accounts: BTreeMap<Tenant, Account>,
    present: usize,
    /// What the last tenant to leave had been served.
    last_left: u64,
}

impl FairShare {
    /// A sequence of `tenant` has come.
    pub fn enter(&mut self, tenant: &Tenant) {
        let known = self.accounts.get(tenant).copied().unwrap_or_default();
        if known.sequences > 0 {
            self.account(tenant).sequences += 1;
            return;
        }
        let present = self.accounts.values().filter(|account| account.sequences > 0);
        let floor = present.map(|account| account.served).min().unwrap_or(self.last_left);
        let account = Account { served: known.served.max(floor), sequences: 1 };
        self.accounts.insert(tenant.clone(), account);
        self.present += 1;
    }

    /// A sequence of `tenant` has gone.
    pub fn leave(&mut self, tenant: &Tenant) {
        let account = self.account(tenant);
        account.sequences -= 1;
        if account.sequences == 0 {
            self.last_left = account.served;
            self.present -= 1;
            self.forget();
        }
    }

    /// `tenant` has been served.
    pub fn charge(&mut self, tenant: &Tenant, tokens: u64) {
        self.account(tenant).served += tokens;
    }

    /// What `tenant` has been served.
    pub fn served(&self, tenant: &Tenant) -> u64 {
        self.accounts.get(tenant).map_or(0, |account| account.served)
    }

    /// Tenants with sequences.
    pub fn present(&self) -> usize {
        self.present
    }

    fn account(&mut self, tenant: &Tenant) -> &mut Account {
        self.accounts.entry(tenant.clone()).or_default()
    }

    fn forget(&mut self) {
        if self.accounts.len() - self.present <= ABSENT_MAX {
            return;
        }
        let absent = self.accounts.iter().filter(|(_, account)| account.sequences == 0);
        if let Some(tenant) = absent.min_by_key(|(_, account)| account.served).map(|(tenant, _)| tenant.clone()) {
            self.accounts.remove(&tenant);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(name: &str) -> Tenant {
        Some(name.into())
    }

    #[test]
    fn idle_time_cannot_be_saved_up() {
        let mut share = FairShare::default();
        share.enter(&tenant("a"));
        share.charge(&tenant("a"), 1000);
        share.enter(&tenant("b"));
        assert_eq!(share.served(&tenant("b")), 1000, "lifted to the only one present");
        share.charge(&tenant("b"), 50);
        share.leave(&tenant("b"));
        share.charge(&tenant("a"), 20);
        share.enter(&tenant("b"));
        assert_eq!(share.served(&tenant("b")), 1050, "what it had been served already stays");
    }

    #[test]
    fn who_comes_to_an_empty_house_starts_level_with_the_last_to_leave() {
        let mut share = FairShare::default();
        share.enter(&tenant("a"));
        share.charge(&tenant("a"), 700);
        share.leave(&tenant("a"));
        share.enter(&tenant("b"));
        share.enter(&tenant("a"));
        assert_eq!((share.served(&tenant("a")), share.served(&tenant("b"))), (700, 700));
        assert_eq!(share.present(), 2);
    }

    #[test]
    fn absent_tenants_are_forgotten_beyond_a_bound() {
        let mut share = FairShare::default();
        for i in 0..ABSENT_MAX as u64 + 10 {
            let name = tenant(&i.to_string());
            share.enter(&name);
            share.charge(&name, 1);
            share.leave(&name);
        }
        assert_eq!(share.accounts.len(), ABSENT_MAX);
    }
}

//! What was expected and what came: a line for each step as it happens, a table at the end.

use std::time::{Duration, Instant};

/// All steps so far.
#[derive(Debug)]
pub struct Ledger {
    begun: Instant,
    steps: Vec<Step>,
}

#[derive(Debug)]
struct Step {
    what: String,
    expected: String,
    got: String,
}

impl Step {
    fn is_good(&self) -> bool {
        self.expected == self.got
    }
}

impl Ledger {
    pub fn new() -> Ledger {
        Ledger { begun: Instant::now(), steps: Vec::new() }
    }

    /// A heading.
    pub fn scene(&self, title: &str) {
        println!("\n{title}");
    }

    /// Notes and prints a step.
    pub fn step(&mut self, who: &str, what: &str, expected: &str, got: &str, took: Option<Duration>) {
        let step = Step { what: format!("{who}: {what}"), expected: expected.to_owned(), got: got.to_owned() };
        let verdict = if step.is_good() { "ok " } else { "BAD" };
        let took = took.map_or_else(String::new, |took| format!("{} µs", took.as_micros()));
        println!("  {verdict} {took:>9}  {who:<16}{what:<58}expected {expected}, got {got}");
        self.steps.push(step);
    }

    /// More about the step before.
    pub fn note(&self, text: &str) {
        println!("{:>32}{text}", "");
    }

    pub fn is_good(&self) -> bool {
        self.steps.iter().all(Step::is_good)
    }

    /// Every step again, without the talk.
    pub fn print_table(&self) {
        let width =
            |column: fn(&Step) -> &str| self.steps.iter().map(|step| column(step).chars().count()).max().unwrap_or(0);
        let (what, expected, got) = (width(|step| &step.what), width(|step| &step.expected), width(|step| &step.got));
        println!("\n  #  {:<what$}  {:<expected$}  {:<got$}  ok", "step", "expected", "got");
        for (number, step) in self.steps.iter().enumerate() {
            let verdict = if step.is_good() { "yes" } else { "NO" };
            println!(
                "{:>3}  {:<what$}  {:<expected$}  {:<got$}  {verdict}",
                number + 1,
                step.what,
                step.expected,
                step.got
            );
        }
        let bad = self.steps.iter().filter(|step| !step.is_good()).count();
        println!(
            "\n{} steps in {} ms, {bad} of them not as expected",
            self.steps.len(),
            self.begun.elapsed().as_millis()
        );
    }
}

//! Tables for eyes, and what was aimed at beside what came out.

use serde::Serialize;

/// A number that was aimed at. None fails a bench: what it shows is how far off it is.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Goal {
    /// What was measured.
    pub what: &'static str,
    /// The number.
    pub goal: f64,
    /// Whether more is better than the goal.
    pub at_least: bool,
    /// What came out; `null` if it could not be measured.
    pub value: Option<f64>,
    /// Whether that is as good as the goal.
    pub met: bool,
    /// Another number that tells more, and what it is.
    pub beside: Option<Beside>,
}

/// A number beside one that was aimed at.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Beside {
    /// What was measured.
    pub what: &'static str,
    /// What came out; `null` if it could not be measured.
    pub value: Option<f64>,
}

impl Goal {
    /// A number that should not be exceeded.
    pub(super) fn at_most(what: &'static str, goal: f64, value: Option<f64>) -> Self {
        let met = value.is_some_and(|value| value <= goal);
        Self { what, goal, at_least: false, value, met, beside: None }
    }

    /// A number that should be reached.
    pub(super) fn at_least(what: &'static str, goal: f64, value: Option<f64>) -> Self {
        let met = value.is_some_and(|value| value >= goal);
        Self { what, goal, at_least: true, value, met, beside: None }
    }

    /// The same with another number beside it.
    pub(super) fn beside(self, what: &'static str, value: Option<f64>) -> Self {
        Self { beside: Some(Beside { what, value }), ..self }
    }

    /// Goals as a table.
    pub(super) fn table(goals: &[Self]) -> String {
        let mut rows = vec![["goal", "", "result", "", "beside it"].map(str::to_owned).to_vec()];
        for goal in goals {
            let bound = if goal.at_least { "at least" } else { "at most" };
            rows.push(vec![
                goal.what.to_owned(),
                format!("{bound} {}", number(goal.goal)),
                goal.value.map_or_else(|| "-".into(), number),
                if goal.met { "met" } else { "not met" }.to_owned(),
                goal.beside.as_ref().map_or_else(String::new, |Beside { what, value }| {
                    format!("{} {what}", value.map_or_else(|| "-".into(), number))
                }),
            ]);
        }
        columns(&rows)
    }
}

/// A number with as many places as say something.
fn number(value: f64) -> String {
    if value >= 1000.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

/// A multiple, or a dash.
pub(super) fn times(ratio: Option<f64>) -> String {
    ratio.map_or_else(|| "-".into(), |ratio| format!("{ratio:.2}"))
}

/// Rows with aligned columns: the first to the left, the others to the right.
pub(super) fn columns(rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().enumerate().map(|(column, cell)| {
            let width = width(column);
            if column == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        let line = cells.collect::<Vec<_>>().join("  ");
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_is_met_at_its_bound_and_never_by_nothing() {
        assert!(Goal::at_most("x", 1.15, Some(1.15)).met);
        assert!(!Goal::at_most("x", 1.15, Some(1.16)).met);
        assert!(Goal::at_least("x", 0.95, Some(0.95)).met);
        assert!(!Goal::at_least("x", 0.95, Some(0.94)).met);
        assert!(!Goal::at_most("x", 1.0, None).met && !Goal::at_least("x", 0.0, None).met);
    }

    #[test]
    fn a_table_of_goals_says_which_are_met() {
        let goals = [Goal::at_most("a", 2.0, Some(1.5)), Goal::at_least("b", 5e6, Some(4e6))];
        let text = Goal::table(&goals);
        assert!(text.contains("at most 2.00") && text.contains("at least 5000000"), "{text}");
        assert!(text.lines().nth(1).unwrap().ends_with(" met"), "{text}");
        assert!(text.lines().nth(2).unwrap().ends_with("not met"), "{text}");
    }

    #[test]
    fn columns_are_aligned_by_characters() {
        let rows = [vec!["µs".to_owned(), "1".into()], vec!["x".into(), "22".into()]];
        assert_eq!(columns(&rows), "µs   1\nx   22\n");
    }
}

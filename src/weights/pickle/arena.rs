//! The values of a pickle while they grow, and how they become a tree.

use std::rc::Rc;

use anyhow::{Result, bail};

use super::value::{Object, Value};

/// Nesting deeper than Python itself writes by default.
const MAX_DEPTH: usize = 400;

/// What lies on the machine's stack: a finished value, or a node of the arena.
#[derive(Clone)]
pub(super) enum Item {
    Plain(Value),
    Node(usize),
}

/// A value that may still grow, or that holds such values.
pub(super) enum Node {
    List(Vec<Item>),
    Tuple(Vec<Item>),
    Set(Vec<Item>),
    Dict(Vec<(Item, Item)>),
    Object(Box<Growing>),
    Persistent(Item),
}

pub(super) struct Growing {
    pub(super) callable: Item,
    pub(super) arguments: Item,
    pub(super) keywords: Item,
    pub(super) state: Item,
    pub(super) items: Vec<(Item, Item)>,
    pub(super) elements: Vec<Item>,
}

/// All nodes of a pickle, which refer to each other by number.
#[derive(Default)]
pub(super) struct Arena {
    nodes: Vec<Node>,
}

/// How far a node is on its way into a [`Value`].
#[derive(Clone)]
pub(super) enum Frozen {
    Untouched,
    Underway,
    /// With its height.
    Done(Value, usize),
}

impl Arena {
    pub(super) fn add(&mut self, node: Node) -> Item {
        self.nodes.push(node);
        Item::Node(self.nodes.len() - 1)
    }

    pub(super) fn node_mut(&mut self, item: Item) -> Option<&mut Node> {
        match item {
            Item::Node(index) => self.nodes.get_mut(index),
            Item::Plain(_) => None,
        }
    }

    pub(super) fn freeze(&self, root: Item) -> Result<Value> {
        let mut done = vec![Frozen::Untouched; self.nodes.len()];
        Ok(self.freeze_item(&root, 0, &mut done)?.0)
    }

    /// The value and its height.
    fn freeze_item(&self, item: &Item, depth: usize, done: &mut [Frozen]) -> Result<(Value, usize)> {
        let index = match item {
            Item::Plain(value) => return Ok((value.clone(), 0)),
            Item::Node(index) => *index,
        };
        match &done[index] {
            Frozen::Underway => return Ok((Value::Cycle, 0)),
            Frozen::Done(value, height) => return Ok((value.clone(), *height)),
            Frozen::Untouched => {}
        }
        if depth > MAX_DEPTH {
            bail!("the pickle is nested deeper than {MAX_DEPTH} levels");
        }
        done[index] = Frozen::Underway;
        let mut height = 0;
        let mut one = |item: &Item| -> Result<Value> {
            let (value, h) = self.freeze_item(item, depth + 1, done)?;
            height = height.max(h + 1);
            Ok(value)
        };
        let value = match &self.nodes[index] {
            Node::List(items) => Value::List(items.iter().map(one).collect::<Result<_>>()?),
            Node::Tuple(items) => Value::Tuple(items.iter().map(one).collect::<Result<_>>()?),
            Node::Set(items) => Value::Set(items.iter().map(one).collect::<Result<_>>()?),
            Node::Dict(items) => Value::Dict(items.iter().map(|(k, v)| Ok((one(k)?, one(v)?))).collect::<Result<_>>()?),
            Node::Persistent(item) => Value::Persistent(Rc::new(one(item)?)),
            Node::Object(object) => Value::Object(Rc::new(Object {
                callable: one(&object.callable)?,
                arguments: one(&object.arguments)?,
                keywords: one(&object.keywords)?,
                state: one(&object.state)?,
                items: object.items.iter().map(|(k, v)| Ok((one(k)?, one(v)?))).collect::<Result<_>>()?,
                elements: object.elements.iter().map(one).collect::<Result<_>>()?,
            })),
        };
        // a shared value met on the way counts with its full height, which bounds every later walk
        if height > MAX_DEPTH {
            bail!("the pickle is nested deeper than {MAX_DEPTH} levels");
        }
        done[index] = Frozen::Done(value.clone(), height);
        Ok((value, height))
    }
}

pub(super) fn pairs(values: Vec<Item>) -> Result<Vec<(Item, Item)>> {
    if !values.len().is_multiple_of(2) {
        bail!("a dictionary with a key that has no value");
    }
    let mut values = values.into_iter();
    let mut entries = Vec::with_capacity(values.len() / 2);
    while let (Some(key), Some(value)) = (values.next(), values.next()) {
        entries.push((key, value));
    }
    Ok(entries)
}

//! A serde deserializer for trees.
//!
//! It accepts what `serde_json` accepts for the same tree, except that mapping keys are always text. In
//! return, its errors carry the location of the fault and the expected type.

use serde::de::value::BorrowedStrDeserializer;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, MapAccess, SeqAccess,
    VariantAccess, Visitor,
};
use serde::forward_to_deserialize_any;
use serde_json::{Map, Value};

use crate::fault::{ExpectedType, Fault, FaultKind};

/// Deserializes a value, stopping at the first fault.
pub(crate) fn from_tree<T: DeserializeOwned>(value: &Value) -> Result<T, Fault> {
    T::deserialize(ValueDeserializer(value))
}

struct ValueDeserializer<'de>(&'de Value);

/// Methods that record the expected type. The visitor checks the value against it: it rejects any other
/// type.
macro_rules! expecting {
    ($($method:ident $expected:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
            self.deserialize_any(visitor).map_err(|fault| fault.expecting(ExpectedType::$expected))
        }
    )*};
}

impl<'de> Deserializer<'de> for ValueDeserializer<'de> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.0 {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Number(number) => match (number.as_u64(), number.as_i64()) {
                (Some(number), _) => visitor.visit_u64(number),
                (None, Some(number)) => visitor.visit_i64(number),
                // Any other number is stored as a float.
                (None, None) => visitor.visit_f64(number.as_f64().unwrap_or_default()),
            },
            Value::String(text) => visitor.visit_borrowed_str(text),
            Value::Array(items) => visit_list(items, visitor),
            Value::Object(fields) => visit_mapping(fields, visitor),
        }
    }

    expecting! {
        deserialize_bool Boolean
        deserialize_u8 U8
        deserialize_u16 U16
        deserialize_u32 Unsigned
        deserialize_u64 Unsigned
        deserialize_i8 Signed
        deserialize_i16 Signed
        deserialize_i32 Signed
        deserialize_i64 Signed
        deserialize_f32 Number
        deserialize_f64 Number
        deserialize_str Text
        deserialize_string Text
        deserialize_seq List
        deserialize_map Mapping
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let read = self.deserialize_any(visitor);
        read.map_err(|fault| fault.expecting(ExpectedType::Fields))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.0 {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match self.0 {
            Value::String(variant) => {
                BorrowedStrDeserializer::new(variant).deserialize_enum(name, variants, visitor)
            }
            Value::Object(fields) => match (fields.iter().next(), fields.len()) {
                (Some((variant, content)), 1) => {
                    visitor.visit_enum(EnumDeserializer { variant, content })
                }
                _ => Err(Fault::mismatch(self.0, "map with a single key")),
            },
            other => Err(Fault::mismatch(other, "string or map")),
        }
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_unit()
    }

    forward_to_deserialize_any! {
        i128 u128 char bytes byte_buf unit unit_struct tuple tuple_struct identifier
    }
}

fn visit_list<'de, V: Visitor<'de>>(items: &'de [Value], visitor: V) -> Result<V::Value, Fault> {
    let mut access = SeqDeserializer {
        items: items.iter().enumerate(),
    };
    let value = visitor.visit_seq(&mut access)?;
    match access.items.next() {
        None => Ok(value),
        Some(_) => Err(Fault::new(FaultKind::Length {
            actual: items.len(),
            expected: "fewer elements in array".into(),
        })),
    }
}

struct SeqDeserializer<'de> {
    items: std::iter::Enumerate<std::slice::Iter<'de, Value>>,
}

impl<'de> SeqAccess<'de> for SeqDeserializer<'de> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Fault> {
        let Some((index, item)) = self.items.next() else {
            return Ok(None);
        };
        let read = seed.deserialize(ValueDeserializer(item));
        read.map(Some)
            .map_err(|fault| fault.nested_in(index.to_string()))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.items.len())
    }
}

fn visit_mapping<'de, V: Visitor<'de>>(
    fields: &'de Map<String, Value>,
    visitor: V,
) -> Result<V::Value, Fault> {
    visitor.visit_map(MapDeserializer {
        fields: fields.iter(),
        field: None,
    })
}

struct MapDeserializer<'de> {
    fields: serde_json::map::Iter<'de>,
    /// The entry whose key has been read.
    field: Option<(&'de String, &'de Value)>,
}

impl<'de> MapAccess<'de> for MapDeserializer<'de> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Fault> {
        self.field = self.fields.next();
        let Some((key, _)) = self.field else {
            return Ok(None);
        };
        let read = seed.deserialize(BorrowedStrDeserializer::new(key));
        read.map(Some).map_err(|fault: Fault| fault.nested_in(key))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Fault> {
        let Some((key, value)) = self.field.take() else {
            let message = "this value was requested before its key; read the key first";
            return Err(Fault::new(FaultKind::Custom(message.into())));
        };
        let read = seed.deserialize(ValueDeserializer(value));
        read.map_err(|fault| fault.nested_in(key))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.fields.len())
    }
}

/// An enum variant with its content, `{variant: content}`. Neither adds a step to the path.
struct EnumDeserializer<'de> {
    variant: &'de str,
    content: &'de Value,
}

impl<'de> EnumAccess<'de> for EnumDeserializer<'de> {
    type Error = Fault;
    type Variant = VariantDeserializer<'de>;

    fn variant_seed<T: DeserializeSeed<'de>>(
        self,
        seed: T,
    ) -> Result<(T::Value, VariantDeserializer<'de>), Fault> {
        let variant = seed.deserialize(BorrowedStrDeserializer::new(self.variant))?;
        Ok((variant, VariantDeserializer(self.content)))
    }
}

struct VariantDeserializer<'de>(&'de Value);

impl<'de> VariantAccess<'de> for VariantDeserializer<'de> {
    type Error = Fault;

    fn unit_variant(self) -> Result<(), Fault> {
        match self.0 {
            Value::Null => Ok(()),
            other => Err(Fault::mismatch(other, "unit")),
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Fault> {
        seed.deserialize(ValueDeserializer(self.0))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _length: usize, visitor: V) -> Result<V::Value, Fault> {
        ValueDeserializer(self.0).deserialize_any(visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        ValueDeserializer(self.0).deserialize_any(visitor)
    }
}

#[cfg(test)]
mod tests {
    use std::fmt;

    use contract::resources::{AutoscaleSpec, DeploymentSpec, EndpointSpec};
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            (-1e9..1e9f64).prop_map(Value::from),
            proptest::sample::select(vec!["", "a", "5s", "50%", "process", "out", "env:A"])
                .prop_map(Value::from),
            (0..3u8).prop_map(Value::from),
        ];
        leaf.prop_recursive(2, 8, 3, |inner| {
            let key = proptest::sample::select(vec![
                "name",
                "min",
                "max",
                "default",
                "secretRef",
                "process",
                "endpoint",
                "deployment",
                "blue",
            ]);
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map(key.prop_map(str::to_owned), inner, 0..4)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    /// Replaces the value at `index` in pre-order with `value`.
    fn replace(tree: &mut Value, index: &mut usize, value: &Value) {
        if *index == 0 {
            *tree = value.clone();
        }
        let Some(left) = index.checked_sub(1) else {
            *index = usize::MAX;
            return;
        };
        *index = left;
        match tree {
            Value::Array(items) => items
                .iter_mut()
                .for_each(|item| replace(item, index, value)),
            Value::Object(fields) => fields
                .values_mut()
                .for_each(|field| replace(field, index, value)),
            _ => {}
        }
    }

    /// Returns whether the tree was accepted.
    fn assert_same<T: DeserializeOwned + PartialEq + fmt::Debug>(tree: &Value) -> bool {
        let ours = from_tree::<T>(tree).ok();
        assert_eq!(ours, serde_json::from_value(tree.clone()).ok(), "{tree}");
        ours.is_some()
    }

    fn trees() -> [Value; 3] {
        [
            json!({"auth": {"key": null}, "traffic": {"blue": 90, "green": 10},
                "limits": {"requestBytesMax": 5}}),
            json!({"backend": "process", "instanceType": "a", "command": ["a", "b"], "region": null,
                "env": {"A": "1", "B": {"secretRef": "env:C"}}, "instances": 2,
                "simulated": {"seed": 7}, "readinessProbe": {"period": "1s"}}),
            json!({"target": ["iris", "blue"], "mode": "live", "profiles": [{
                "name": "default", "priority": -1, "capacity": [1, 5, 2], "rules": [{
                    "name": "a", "metric": {"name": "b", "perInstance": true},
                    "scale": {"direction": "out", "steps": [{"above": 1.5, "by": "5%"}]},
                    "track": {"target": 3}}]}]}),
        ]
    }

    fn assert_all_same([endpoint, deployment, autoscale]: &[Value; 3]) -> [bool; 3] {
        [
            assert_same::<EndpointSpec>(endpoint),
            assert_same::<DeploymentSpec>(deployment),
            assert_same::<AutoscaleSpec>(autoscale),
        ]
    }

    #[test]
    fn valid_trees_are_accepted() {
        assert_eq!(assert_all_same(&trees()), [true; 3]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2048, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_tree_is_deserialized_as_by_serde_json(index in 0..24usize, value in any_value()) {
            let trees = trees().map(|mut tree| {
                replace(&mut tree, &mut index.clone(), &value);
                tree
            });
            assert_all_same(&trees);
        }
    }
}

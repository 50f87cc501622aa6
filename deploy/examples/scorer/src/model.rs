//! The model: an ensemble of small networks that classifies three kinds of iris.
//!
//! Each member is a network of two hidden layers with fixed random weights (`SEED`, and the member's
//! number). Its last layer compares a flower's features with those of each kind's average flower: the
//! nearer, the higher the score. The ensemble's answer is the mean over its members, so its cost is
//! that of its members, and `--work` says how many there are. Invariant: the same arguments and the
//! same flower always give the same answer.

use std::fmt;

/// Measurements of one flower in centimetres: sepal length, sepal width, petal length, petal width.
pub const INPUTS: usize = 4;
pub const CLASSES: [&str; 3] = ["setosa", "versicolor", "virginica"];

/// Mean measurements of the fifty flowers of each kind in Fisher's data (1936).
const AVERAGE_FLOWERS: [[f32; INPUTS]; 3] = [
    [5.006, 3.428, 1.462, 0.246],
    [5.936, 2.770, 4.260, 1.326],
    [6.588, 2.974, 5.552, 2.026],
];
/// Mean and standard deviation of each measurement over all 150 flowers.
const MEAN: [f32; INPUTS] = [5.843, 3.057, 3.758, 1.199];
const DEVIATION: [f32; INPUTS] = [0.828, 0.436, 1.765, 0.762];

/// First state of the generator of all weights: the year of Fisher's paper.
const SEED: u64 = 1936;

pub struct Model {
    members: Vec<Member>,
}

/// Scores of one flower, in the order of `CLASSES`; they sum to 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scores(pub [f32; 3]);

#[derive(Debug, PartialEq)]
pub struct NotAMeasurement {
    pub column: usize,
}

impl Model {
    pub fn new(hidden: usize, members: usize) -> Self {
        let members = (0..members as u64)
            .map(|number| Member::new(hidden, number))
            .collect();
        Self { members }
    }

    pub fn score(&self, flower: &[f32; INPUTS]) -> Result<Scores, NotAMeasurement> {
        if let Some(column) = flower.iter().position(|value| !value.is_finite()) {
            return Err(NotAMeasurement { column });
        }
        let flower = standardised(flower);
        let mut distances = [0.0; 3];
        for member in &self.members {
            for (total, distance) in distances.iter_mut().zip(member.distances(&flower)) {
                *total += distance;
            }
        }
        Ok(Scores(softmax_of_negative(
            distances.map(|total| total / self.members.len() as f32),
        )))
    }
}

impl Scores {
    pub fn class(&self) -> &'static str {
        let mut best = 0;
        for index in 1..CLASSES.len() {
            if self.0[index] > self.0[best] {
                best = index;
            }
        }
        CLASSES[best]
    }
}

impl fmt::Display for NotAMeasurement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "column {} is not a finite number", self.column)
    }
}

/// One network, and the features it gives the average flower of each kind.
struct Member {
    first: Layer,
    second: Layer,
    averages: Vec<Vec<f32>>,
}

impl Member {
    fn new(hidden: usize, number: u64) -> Self {
        let mut random = SplitMix64(SEED ^ number.wrapping_mul(0x2545_F491_4F6C_DD1D));
        let mut member = Self {
            first: Layer::new(INPUTS, hidden, &mut random),
            second: Layer::new(hidden, hidden, &mut random),
            averages: Vec::new(),
        };
        member.averages = AVERAGE_FLOWERS
            .iter()
            .map(|flower| member.features(&standardised(flower)))
            .collect();
        member
    }

    fn features(&self, flower: &[f32; INPUTS]) -> Vec<f32> {
        self.second.apply(&self.first.apply(flower))
    }

    /// Mean squared distance of the flower's features from those of each kind, times a temperature
    /// that makes scores of clear cases close to 1.
    fn distances(&self, flower: &[f32; INPUTS]) -> [f32; 3] {
        let features = self.features(flower);
        let mut distances = [0.0; 3];
        for (distance, average) in distances.iter_mut().zip(&self.averages) {
            let squares: f32 = features
                .iter()
                .zip(average)
                .map(|(one, other)| (one - other) * (one - other))
                .sum();
            *distance = 24.0 * squares / features.len() as f32;
        }
        distances
    }
}

/// A fully connected layer with tanh, weights row by row.
struct Layer {
    weights: Vec<f32>,
    biases: Vec<f32>,
    inputs: usize,
}

impl Layer {
    fn new(inputs: usize, outputs: usize, random: &mut SplitMix64) -> Self {
        // Keeps the sums in the range where tanh is not saturated.
        let scale = 1.5 / (inputs as f32).sqrt();
        Self {
            weights: (0..inputs * outputs)
                .map(|_| scale * random.next())
                .collect(),
            biases: (0..outputs).map(|_| 0.5 * random.next()).collect(),
            inputs,
        }
    }

    fn apply(&self, values: &[f32]) -> Vec<f32> {
        self.weights
            .chunks_exact(self.inputs)
            .zip(&self.biases)
            .map(|(row, bias)| {
                let sum: f32 = row.iter().zip(values).map(|(w, x)| w * x).sum();
                (sum + bias).tanh()
            })
            .collect()
    }
}

fn standardised(flower: &[f32; INPUTS]) -> [f32; INPUTS] {
    std::array::from_fn(|index| (flower[index] - MEAN[index]) / DEVIATION[index])
}

fn softmax_of_negative(distances: [f32; 3]) -> [f32; 3] {
    let nearest = distances.iter().copied().fold(f32::INFINITY, f32::min);
    let weights = distances.map(|distance| (nearest - distance).exp());
    let sum: f32 = weights.iter().sum();
    weights.map(|weight| weight / sum)
}

/// Steele, Lea and Flood's generator: small, and gives the same weights on every machine.
struct SplitMix64(u64);

impl SplitMix64 {
    /// Uniform in -1 to 1.
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let unit = ((z ^ (z >> 31)) >> 40) as f32 / (1_u64 << 24) as f32;
        2.0 * unit - 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two flowers of each kind from Fisher's table, with their kind.
    const FLOWERS: [([f32; INPUTS], &str); 6] = [
        ([5.1, 3.5, 1.4, 0.2], "setosa"),
        ([4.7, 3.2, 1.3, 0.2], "setosa"),
        ([5.7, 2.8, 4.5, 1.3], "versicolor"),
        ([6.0, 2.2, 4.0, 1.0], "versicolor"),
        ([6.3, 3.3, 6.0, 2.5], "virginica"),
        ([7.7, 2.6, 6.9, 2.3], "virginica"),
    ];

    #[test]
    fn both_network_sizes_classify_the_three_kinds() {
        for hidden in [16, 32] {
            let model = Model::new(hidden, 20);
            for (flower, kind) in FLOWERS {
                let scores = model.score(&flower).unwrap();
                assert_eq!(scores.class(), kind, "{flower:?} with {hidden}: {scores:?}");
            }
        }
    }

    #[test]
    fn scores_are_shares_that_sum_to_one() {
        let scores = Model::new(16, 5).score(&[1.0, 50.0, -3.0, 0.0]).unwrap().0;
        assert!(scores.iter().all(|score| (0.0..=1.0).contains(score)));
        assert!((scores.iter().sum::<f32>() - 1.0).abs() < 1e-5);
    }

    #[test]
    fn the_same_arguments_give_the_same_scores() {
        let flower = FLOWERS[3].0;
        let one = Model::new(16, 3).score(&flower).unwrap();
        let other = Model::new(16, 3).score(&flower).unwrap();
        assert_eq!(one, other);
    }

    #[test]
    fn a_larger_network_is_another_model() {
        let flower = FLOWERS[3].0;
        let small = Model::new(16, 3).score(&flower).unwrap();
        let large = Model::new(32, 3).score(&flower).unwrap();
        assert_ne!(small, large);
    }

    #[test]
    fn every_member_affects_the_result() {
        let flower = FLOWERS[3].0;
        let one = Model::new(16, 1).score(&flower).unwrap();
        let two = Model::new(16, 2).score(&flower).unwrap();
        assert_ne!(one, two);
    }

    #[test]
    fn values_that_are_not_finite_are_refused_with_their_column() {
        let model = Model::new(16, 1);
        assert_eq!(
            model.score(&[5.1, 3.5, f32::NAN, 0.2]),
            Err(NotAMeasurement { column: 2 })
        );
    }

    #[test]
    fn the_generator_gives_the_published_sequence() {
        // First output of SplitMix64 from state 0 is 0xE220A8397B1DCDAF.
        let expected = 2.0 * (0xE2_20A8 as f32 / (1_u64 << 24) as f32) - 1.0;
        assert_eq!(SplitMix64(0).next(), expected);
    }
}

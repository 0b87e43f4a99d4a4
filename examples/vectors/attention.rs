// Answers golden vectors of softmax attention, with nothing but Rust's standard library.
//
//     refattn vectors softmax -o golden
//     rustc --edition 2021 -O attention.rs && mkdir -p answers && ./attention golden answers
//     refattn vectors --verify golden answers
//
// With a third argument, top-left, it has a mistake that many kernels had: causality aligned with the first key, not the last.
// Replace `attend` by a call of your kernel; the rest reads and writes files.  It expects float32 vectors.
use std::{env, fs};

// ---- JSON, read in place: a value is the text that begins with it ------------------------------------------------------------

fn blank(text: &str) -> &str {
    text.trim_start_matches([' ', '\n', '\t', '\r', ',', ':'])
}

/// What follows a value.
fn skip(text: &str) -> &str {
    let text = blank(text);
    match text.as_bytes()[0] {
        b'"' => {
            let mut escaped = false;
            for (n, c) in text.char_indices().skip(1) {
                match c {
                    _ if escaped => escaped = false,
                    '\\' => escaped = true,
                    '"' => return &text[n + 1..],
                    _ => {}
                }
            }
            panic!("a string has no end")
        }
        b'{' | b'[' => {
            let mut rest = blank(&text[1..]);
            while !rest.starts_with(['}', ']']) {
                rest = blank(skip(rest));
            }
            &rest[1..]
        }
        _ => &text[text.find([',', ']', '}', ' ', '\n']).unwrap_or(text.len())..],
    }
}

fn string(text: &str) -> &str {
    &text[1..text.len() - skip(text).len() - 1]
}

/// The elements of an array.
fn elements(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = blank(&text[1..]);
    while !rest.starts_with(']') {
        found.push(rest);
        rest = blank(skip(rest));
    }
    found
}

/// The value of an object's member.
fn member<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let mut rest = blank(&text[1..]);
    while !rest.starts_with('}') {
        let (name, value) = (string(rest), blank(skip(rest)));
        if name == key {
            return Some(value);
        }
        rest = blank(skip(value));
    }
    None
}

/// The number at the beginning, where there is one.
fn number(text: &str) -> Option<f64> {
    text[..text.len() - skip(text).len()].parse().ok()
}

// ---- tensors ------------------------------------------------------------------------------------------------------------------

struct Tensor {
    shape: Vec<usize>,
    data: Vec<f32>,
}

impl Tensor {
    /// An element; along an axis of size 1 there is one for every index.
    fn at(&self, index: [usize; 4]) -> f32 {
        let place = |sum, (&n, &i)| sum * n + if n == 1 { 0 } else { i };
        self.data[self.shape.iter().zip(&index).fold(0, place)]
    }
}

/// A tensor of a safetensors file: 8 bytes with the header's length, the header, the data.
fn tensor(file: &[u8], name: &str) -> Option<Tensor> {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&file[8..8 + length]).unwrap();
    let entry = member(header, name)?;
    let whole = |key| -> Vec<usize> { elements(member(entry, key).unwrap()).into_iter().map(|n| number(n).unwrap() as usize).collect() };
    let (shape, offsets) = (whole("shape"), whole("data_offsets"));
    let bytes = &file[8 + length + offsets[0]..8 + length + offsets[1]];
    let data = match string(member(entry, "dtype").unwrap()) {
        "F32" => bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        "BOOL" => bytes.iter().map(|&b| b as f32).collect(),
        other => panic!("{name} is {other}, which is not read here"),
    };
    Some(Tensor { shape, data })
}

// ---- attention ------------------------------------------------------------------------------------------------------------------

struct Params {
    scale: f32,
    softcap: Option<f32>,
    causal: bool,
    top_left: bool,
    window: (isize, isize),
}

fn attend(file: &[u8], p: &Params) -> (Vec<usize>, Vec<f32>, Vec<f32>) {
    let [q, k, v] = ["q", "k", "v"].map(|name| tensor(file, name).unwrap());
    let [bias, mask, sinks] = ["bias", "mask", "sinks"].map(|name| tensor(file, name));
    let (heads, n_q, d, n_k, e) = (q.shape[1], q.shape[2], q.shape[3], k.shape[2], v.shape[3]);
    let group = heads / k.shape[1];
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for b in 0..q.shape[0] {
        for h in 0..heads {
            let sink = sinks.as_ref().map_or(f32::NEG_INFINITY, |x| x.data[h]);
            for i in 0..n_q {
                let own = i as isize + if p.top_left { 0 } else { n_k as isize - n_q as isize };
                let score = |j: usize| {
                    let ahead = j as isize - own;
                    let hidden = (p.causal && ahead > 0) || ahead < -p.window.0 || ahead > p.window.1;
                    if hidden || mask.as_ref().is_some_and(|x| x.at([b, h, i, j]) == 0.0) {
                        return f32::NEG_INFINITY;
                    }
                    let dot: f32 = (0..d).map(|x| q.at([b, h, i, x]) * k.at([b, h / group, j, x])).sum();
                    let s = dot * p.scale;
                    p.softcap.map_or(s, |cap| cap * (s / cap).tanh()) + bias.as_ref().map_or(0.0, |x| x.at([b, h, i, j]))
                };
                let scores: Vec<f32> = (0..n_k).map(score).collect();
                let top = scores.iter().fold(sink, |a, &s| a.max(s));
                let mut total = if top == f32::NEG_INFINITY { 0.0 } else { (sink - top).exp() };
                let mut sum = vec![0.0; e];
                for (j, s) in scores.iter().enumerate().filter(|(_, s)| **s > f32::NEG_INFINITY) {
                    let weight = (s - top).exp();
                    total += weight;
                    (0..e).for_each(|x| sum[x] += weight * v.at([b, h / group, j, x]));
                }
                out.extend(sum.iter().map(|x| if total > 0.0 { x / total } else { 0.0 }));
                lse.push(if total > 0.0 { top + total.ln() } else { f32::NEG_INFINITY });
            }
        }
    }
    (vec![q.shape[0], heads, n_q, e], out, lse)
}

// ---- one case after another -----------------------------------------------------------------------------------------------------

fn main() {
    let arguments: Vec<String> = env::args().collect();
    let (from, to) = (&arguments[1], &arguments[2]);
    let mistake = arguments.get(3).is_some_and(|x| x == "top-left");
    let manifest = fs::read_to_string(format!("{from}/manifest.json")).expect("no manifest");
    for entry in elements(member(&manifest, "cases").unwrap()) {
        if string(member(entry, "variant").unwrap()) != "softmax" {
            continue;
        }
        let name = string(member(entry, "file").unwrap());
        let params = member(entry, "params").unwrap();
        let resolved = member(entry, "resolved").unwrap();
        let given = |key| member(params, key).and_then(number);
        let side = |n: usize| elements(member(params, "window").unwrap()).get(n).and_then(|x| number(x)).map_or(1 << 40, |x| x as isize);
        let windowed = member(params, "window").unwrap().starts_with('[');
        let top_left = member(params, "causal").unwrap().starts_with('"');
        let p = Params {
            scale: given("scale").or(member(resolved, "scale").and_then(number)).unwrap() as f32,
            softcap: given("softcap").map(|x| x as f32),
            causal: top_left || member(params, "causal").unwrap().starts_with("true"),
            top_left: top_left || mistake,
            window: if windowed { (side(0), side(1)) } else { (1 << 40, 1 << 40) },
        };
        let file = fs::read(format!("{from}/{name}")).expect("no such case");
        let (shape, out, lse) = attend(&file, &p);
        let (middle, end) = (4 * out.len(), 4 * (out.len() + lse.len()));
        let header = format!(
            "{{\"out\":{{\"dtype\":\"F32\",\"shape\":{:?},\"data_offsets\":[0,{middle}]}},\
             \"lse\":{{\"dtype\":\"F32\",\"shape\":{:?},\"data_offsets\":[{middle},{end}]}}}}",
            shape,
            &shape[..3]
        );
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        out.iter().chain(&lse).for_each(|x| bytes.extend(x.to_le_bytes()));
        fs::write(format!("{to}/{name}"), bytes).expect("cannot write");
    }
}

// Answers golden vectors of softmax attention, with nothing but Node.
//
//     refattn vectors softmax -o golden
//     mkdir -p answers && node attention.mjs golden answers
//     refattn vectors --verify golden answers
//
// With a third argument, top-left, it has a mistake that many kernels had: causality aligned with the first key, not the last.
// Replace `attend` by a call of your kernel; the rest reads and writes files.  It expects float32 vectors.
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

const [from, to, mistake] = process.argv.slice(2);

// A tensor as { shape, data }; undefined where it is not in the file.
function tensors(path) {
  const bytes = readFileSync(path);
  const length = Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.toString("utf8", 8, 8 + length));
  const found = {};
  for (const [name, { dtype, shape, data_offsets: [start, end] }] of Object.entries(header)) {
    const data = new Uint8Array(bytes.subarray(8 + length + start, 8 + length + end)).buffer;
    found[name] = { shape, data: dtype === "BOOL" ? new Uint8Array(data) : dtype === "F32" ? new Float32Array(data) : new Float64Array(data) };
  }
  return found;
}

function write(path, outputs) {
  const header = {};
  let end = 0;
  for (const [name, { shape, data }] of Object.entries(outputs)) {
    header[name] = { dtype: "F32", shape, data_offsets: [end, end + data.byteLength] };
    end += data.byteLength;
  }
  const text = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  writeFileSync(path, Buffer.concat([length, text, ...Object.values(outputs).map(({ data }) => Buffer.from(data.buffer))]));
}

// Where element (b, h, i, j) of an operand that may broadcast lies.
function place({ shape }, ...index) {
  return index.reduce((sum, n, axis) => sum * shape[axis] + (shape[axis] === 1 ? 0 : n), 0);
}

function attend({ q, k, v, bias, mask, sinks }, { scale, softcap, causal, window }) {
  const [B, H, T, D] = q.shape, [, kvHeads, S, E] = [...v.shape];
  const out = new Float32Array(B * H * T * E), lse = new Float32Array(B * H * T);
  const [left, right] = (window ?? [null, null]).map((side) => side ?? Infinity);
  for (let b = 0; b < B; b++)
    for (let h = 0; h < H; h++) {
      const g = Math.floor(h / (H / kvHeads));
      for (let i = 0; i < T; i++) {
        const own = causal === "top_left" || mistake === "top-left" ? i : i + S - T;
        const score = new Float32Array(S).fill(-Infinity);
        for (let j = 0; j < S; j++) {
          if ((causal && j > own) || j < own - left || j > own + right) continue;
          if (mask && !mask.data[place(mask, b, h, i, j)]) continue;
          let s = 0;
          for (let d = 0; d < D; d++) s += q.data[place(q, b, h, i, d)] * k.data[place(k, b, g, j, d)];
          s *= scale;
          if (softcap !== null) s = softcap * Math.tanh(s / softcap);
          score[j] = s + (bias ? bias.data[place(bias, b, h, i, j)] : 0);
        }
        const sink = sinks ? sinks.data[h] : -Infinity;
        const top = score.reduce((a, s) => Math.max(a, s), sink);
        const row = (b * H + h) * T + i;
        let total = top === -Infinity ? 0 : Math.exp(sink - top);
        const sum = new Float64Array(E);
        for (let j = 0; j < S; j++) {
          if (score[j] === -Infinity) continue;
          const weight = Math.exp(score[j] - top);
          total += weight;
          for (let e = 0; e < E; e++) sum[e] += weight * v.data[place(v, b, g, j, e)];
        }
        for (let e = 0; e < E; e++) out[row * E + e] = total > 0 ? sum[e] / total : 0;
        lse[row] = total > 0 ? top + Math.log(total) : -Infinity;
      }
    }
  return { out: { shape: [B, H, T, E], data: out }, lse: { shape: [B, H, T], data: lse } };
}

const manifest = JSON.parse(readFileSync(join(from, "manifest.json"), "utf8"));
for (const { file, variant, params, resolved } of manifest.cases)
  if (variant === "softmax") write(join(to, file), attend(tensors(join(from, file)), { ...params, scale: params.scale ?? resolved.scale }));

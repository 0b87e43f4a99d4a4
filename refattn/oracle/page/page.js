"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const make = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};

/* ---- light and dark: as the system says, until the button says otherwise -------------------------------------------------- */
const system = matchMedia("(prefers-color-scheme: dark)");
const dark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
const pictures = [];
const redraw = () => pictures.forEach(draw => draw());
const kept = { get: () => { try { return localStorage.getItem("refattn-theme"); } catch { return null; } },
               set: x => { try { localStorage.setItem("refattn-theme", x); } catch { /* a file may have no storage */ } } };
if (kept.get()) root.dataset.theme = kept.get();
const toggle = document.getElementById("theme");
const named = () => { toggle.textContent = dark() ? "Light" : "Dark"; toggle.setAttribute("aria-label", `Switch to the ${dark() ? "light" : "dark"} theme`); };
toggle.hidden = false;
toggle.onclick = () => { root.dataset.theme = dark() ? "light" : "dark"; kept.set(root.dataset.theme); named(); redraw(); };
system.addEventListener("change", () => { named(); redraw(); });
let before;
addEventListener("beforeprint", () => { before = root.dataset.theme; root.dataset.theme = "light"; redraw(); });
addEventListener("afterprint", () => { if (before) root.dataset.theme = before; else delete root.dataset.theme; redraw(); });
named();

/* ---- what a byte of a picture means, as a colour and in words --------------------------------------------------------------- */
const { TOLERANCE, STEPS, INFINITE } = data.bytes;
const mix = (stops, t) => {
  const at = Math.min(Math.max(t, 0), 1) * (stops.length - 1), i = Math.min(Math.floor(at), stops.length - 2);
  return `rgb(${stops[i].map((c, n) => Math.round(c + (stops[i + 1][n] - c) * (at - i))).join()})`;
};
const WITHIN = { dark: [[22, 30, 40], [30, 54, 80], [66, 122, 172]], light: [[242, 245, 248], [205, 221, 238], [112, 158, 204]] };
const BEYOND = { dark: [[150, 84, 10], [240, 150, 30], [255, 92, 70], [255, 170, 200], [255, 245, 250]],
                 light: [[250, 204, 120], [238, 130, 38], [206, 48, 32], [122, 10, 56], [44, 0, 36]] };
const topmost = Math.max(TOLERANCE + 3 * STEPS, ...data.pictures.map(p => p.top || 0)); // the worst finite error of the page
const level = byte => (byte - TOLERANCE) / STEPS; // in factors of two from the tolerance
const shade = {
  error: byte => {
    const theme = dark() ? "dark" : "light";
    if (byte === INFINITE) return dark() ? "#ff5cf4" : "#b000b8";
    if (byte > TOLERANCE) return mix(BEYOND[theme], (byte - TOLERANCE) / (topmost - TOLERANCE));
    return mix(WITHIN[theme], byte === 0 ? 0 : 1 + level(byte) / 8);
  },
  mask: byte => (dark() ? ["#1c2430", "#4d7ba8", "#f2c057", "#ff6b57"] : ["#eef1f5", "#7fa3c7", "#d99a00", "#d1331f"])[byte],
};
const spelled = x => (x < 10 ? x.toPrecision(2) : x < 1e5 ? Math.round(+x.toPrecision(2)).toLocaleString("en") : x.toExponential(0).replace("+", ""));
const says = {
  error: byte => (byte === 0 ? "no error" : byte === INFINITE ? "infinite, or NaN on one side" :
    byte === INFINITE - 1 ? `more than ${spelled(2 ** level(byte))} x tolerance` : `about ${spelled(2 ** level(byte))} x tolerance`),
  mask: byte => ["not seen, rightly", "seen, rightly", "not seen, but should be", "seen, but must not be"][byte],
};

/* ---- pictures ------------------------------------------------------------------------------------------------------------------ */
const decode = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));

function picture(figure, p) {
  const cells = p.layers.map(() => null);
  const [rows, columns] = p.size;
  const begins = axis => i => (p.shape[axis] > p.size[axis] ? Math.floor((i * p.shape[axis]) / p.size[axis]) : i);
  const where = (axis, i) => {
    const first = begins(axis)(i), last = begins(axis)(i + 1) - 1;
    if (axis === 0 && p.names) return p.names[i];
    return `${p.axes[axis]} ${last > first ? `${first} to ${last}` : first}`;
  };
  let layer = p.first, cursor = null, geometry = null;
  const reading = make("div", { className: "reading" });
  reading.setAttribute("aria-live", "polite");
  const box = make("div", { className: "canvases" });
  const views = p.kind === "mask" ? ["as specified", "as found"] : [""];
  const canvases = views.map(view => {
    const canvas = make("canvas", { tabIndex: 0 });
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${p.title} ${view}: ${p.axes[0]} down, ${p.axes[1]} across. Arrow keys read it cell by cell.`);
    box.append(make("div", {}, ...(view ? [make("div", { className: "small soft", textContent: view })] : []), canvas));
    return canvas;
  });
  const caption = make("figcaption", {}, make("b", { textContent: p.title }));
  let select = null;
  if (p.layers.length > 1) {
    select = make("select", {}, ...p.layers.map((x, n) => make("option", { value: n, textContent: x.name })));
    select.setAttribute("aria-label", "Which head");
    select.value = layer;
    select.onchange = () => { layer = +select.value; draw(); };
    caption.append(select);
  } else if (p.layers[0].name) caption.append(make("span", { className: "small soft", textContent: p.layers[0].name }));
  figure.append(caption, box, reading, legend(p));

  function draw() {
    const bytes = (cells[layer] ||= decode(p.layers[layer].data));
    const left = p.names ? 58 : 40, bottom = 30, side = figure.clientWidth || 360;
    const pair = views.length > 1 && side >= 560;
    const room = Math.max(60, (pair ? (side - 30) / 2 : side) - left - 8);
    let w = Math.min(Math.max(room / columns, 0.4), 20), h = Math.min(Math.max(360 / rows, 0.4), 20);
    if (p.kind === "mask") w = h = Math.min(w, Math.max(h, 4));
    else { w = Math.min(w, Math.max(3 * h, 1.2)); h = Math.min(h, 2 * w); }
    if (w >= 2) w = Math.floor(w);
    if (h >= 2) h = Math.floor(h);
    geometry = { left, w, h };
    const style = getComputedStyle(root), ink = style.getPropertyValue("--soft"), strong = style.getPropertyValue("--ink");
    canvases.forEach((canvas, view) => {
      const width = Math.ceil(left + columns * w + 8), height = Math.ceil(rows * h + bottom + 4), scale = devicePixelRatio || 1;
      canvas.width = width * scale; canvas.height = height * scale;
      canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
      const to = canvas.getContext("2d");
      to.scale(scale, scale);
      const gap = Math.min(w, h) >= 7 ? 1 : 0;
      for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) {
        const byte = bytes[i * columns + j], x = left + j * w, y = 2 + i * h;
        const shown = p.kind === "mask" && view === 0 ? (byte === 2 ? 1 : byte === 3 ? 0 : byte) : byte;
        to.fillStyle = shade[p.kind](shown);
        to.fillRect(x, y, w - gap || w, h - gap || h);
        if (Math.min(w, h) < 6) continue;
        const wrong = p.kind === "mask" ? shown > 1 : shown === INFINITE;
        if (!wrong) continue;
        to.strokeStyle = dark() ? "#0d1117" : "#ffffff"; to.lineWidth = 1.3; to.beginPath();
        const cx = x + (w - gap) / 2, cy = y + (h - gap) / 2, r = Math.min(w, h) / 4;
        if (shown === 2) to.arc(cx, cy, r, 0, 7);
        else { to.moveTo(cx - r, cy - r); to.lineTo(cx + r, cy + r); to.moveTo(cx + r, cy - r); to.lineTo(cx - r, cy + r); }
        to.stroke();
      }
      to.fillStyle = ink; to.font = `10px ${style.getPropertyValue("--mono")}`;
      const ticks = (n, size, space) => {
        const each = [1, 2, 4, 8, 16, 32, 64, 128, 256].find(k => k * size >= space) || 256;
        return [...Array(Math.ceil(n / each)).keys()].map(k => k * each);
      };
      to.textAlign = "center"; to.textBaseline = "top";
      for (const j of ticks(columns, w, 26)) to.fillText(begins(1)(j), left + (j + 0.5) * w, rows * h + 6);
      to.fillText(`${p.axes[1]} \u2192`, left + Math.max((columns * w) / 2, 20), rows * h + 18);
      to.textAlign = "right"; to.textBaseline = "middle";
      const short = name => name.match(/\d+/g).join(",");
      for (const i of ticks(rows, h, 14)) to.fillText(p.names ? short(p.names[i]) : begins(0)(i), left - 5, 2 + (i + 0.5) * h);
      if (rows * h >= 50) {
        to.save(); to.translate(7, 2 + (rows * h) / 2); to.rotate(-Math.PI / 2); to.textAlign = "center";
        to.fillText(p.axes[0].length * 6 < rows * h ? `\u2190 ${p.axes[0]}` : "\u2190", 0, 0); to.restore();
      }
      if (cursor) { to.strokeStyle = strong; to.lineWidth = 2; to.strokeRect(left + cursor[1] * w - 1, 1 + cursor[0] * h, w + 1, h + 1); }
    });
    read();
  }
  function read() {
    if (!cursor) { reading.textContent = "\u00a0"; return; }
    const byte = cells[layer][cursor[0] * columns + cursor[1]];
    reading.textContent = `${[where(0, cursor[0]), where(1, cursor[1])].filter(x => x.trim()).join(", ")}: ${says[p.kind](byte)}`;
  }
  const under = (canvas, event) => {
    const edge = canvas.getBoundingClientRect(), zoom = canvas.offsetWidth / parseFloat(canvas.style.width);
    const j = Math.floor(((event.clientX - edge.left) / zoom - geometry.left) / geometry.w), i = Math.floor(((event.clientY - edge.top) / zoom - 2) / geometry.h);
    return i >= 0 && j >= 0 && i < rows && j < columns ? [i, j] : null;
  };
  const choose = () => { if (cursor && p.selects && figure.chooses) figure.chooses(cursor[0]); };
  for (const canvas of canvases) {
    canvas.onpointermove = event => { cursor = under(canvas, event); draw(); };
    canvas.onpointerleave = () => { if (document.activeElement !== canvas) { cursor = null; draw(); } };
    canvas.onclick = event => { cursor = under(canvas, event); draw(); choose(); };
    canvas.onblur = () => { cursor = null; draw(); };
    canvas.onkeydown = event => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (event.key === "Enter") return choose();
      if (!step) return;
      event.preventDefault();
      cursor = cursor ? [Math.min(Math.max(cursor[0] + step[0], 0), rows - 1), Math.min(Math.max(cursor[1] + step[1], 0), columns - 1)] : [0, 0];
      draw();
    };
    if (p.selects) canvas.style.cursor = "pointer";
  }
  figure.shows = n => { layer = n; if (select) select.value = n; draw(); };
  figure.picture = p;
  pictures.push(draw);
  draw();
}

function legend(p) {
  const line = make("div", { className: "legend" });
  const swatch = (byte, text) => {
    const square = make("i");
    pictures.push(() => { square.style.background = shade[p.kind](byte); });
    square.style.background = shade[p.kind](byte);
    line.append(make("span", {}, square, text));
  };
  if (p.kind === "mask") [[1, "seen"], [3, "\u00d7 seen, but must not be"], [2, "\u25cb not seen, but should be"]].forEach(x => swatch(...x));
  else {
    const bar = make("div"), ticks = make("p"), middle = 40; // per cent: the tolerance
    const stops = () => [...Array(21).keys()].map(n => {
      const at = n * 5, byte = at <= middle ? TOLERANCE - (1 - at / middle) * 8 * STEPS : TOLERANCE + 0.01 + ((at - middle) / (100 - middle)) * (topmost - TOLERANCE);
      return `${shade.error(byte)} ${at}%` + (at === middle ? `, ${shade.error(TOLERANCE + 0.01)} ${at}%` : "");
    });
    const paint = () => { bar.style.background = `linear-gradient(90deg, ${stops().join()})`; };
    pictures.push(paint); paint();
    const tick = (at, text, shift) => { const span = make("span", { textContent: text }); span.style.left = `${at}%`; span.style.transform = `translateX(${shift}%)`; ticks.append(span); };
    tick(0, "0", 0); tick(middle, "tolerance", -50); tick(100, `${spelled(2 ** level(topmost))} x`, -100);
    line.append(make("div", { className: "scale" }, bar, ticks));
    if (p.infinite) swatch(INFINITE, "\u00d7 infinite, or NaN on one side");
  }
  if (p.selects) line.append(make("span", { textContent: "Choose a row to see that head." }));
  const pool = [0, 1].map(n => Math.ceil(p.shape[n] / p.size[n]));
  if (pool[0] * pool[1] > 1) line.append(make("span", { textContent: `A cell is the worst of up to ${pool[0]} by ${pool[1]} elements.` }));
  return line;
}

/* Figures in the page name their pictures; a row chosen in one picks the layer of the next. */
function place(gallery) {
  const shown = JSON.parse(gallery.dataset.pictures).map(n => data.pictures[n]);
  const figures = shown.map(p => make("figure", { className: p.kind === "mask" ? "wide" : "" }));
  gallery.append(...figures); // all of them before any is drawn: each then knows how wide it is
  figures.forEach((figure, n) => picture(figure, shown[n]));
  figures.forEach((figure, n) => { if (figure.picture.selects && figures[n + 1]) figure.chooses = row => figures[n + 1].shows(row); });
}
document.querySelectorAll("[data-pictures]").forEach(place);
let pending;
let wide = innerWidth;
addEventListener("resize", () => { if (innerWidth !== wide) { wide = innerWidth; clearTimeout(pending); pending = setTimeout(redraw, 120); } });

/* ---- the table of calls ---------------------------------------------------------------------------------------------------- */
const table = document.querySelector("#calls table");
if (table) {
  const bodies = [...table.tBodies];
  const keys = { call: b => b.rows[0].cells[0].textContent.trim(), outcome: b => b.className, error: b => +b.dataset.error, ratio: b => +b.dataset.ratio, order: b => +b.dataset.n };
  document.querySelectorAll("#calls thead button").forEach(button => {
    button.onclick = () => {
      const head = button.closest("th"), up = head.getAttribute("aria-sort") === "ascending", key = keys[head.dataset.key];
      document.querySelectorAll("#calls th[aria-sort]").forEach(x => x.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", up ? "descending" : "ascending");
      const sorted = bodies.slice().sort((a, b) => { const x = key(a), y = key(b); return (x < y ? -1 : x > y ? 1 : 0) * (up ? -1 : 1); });
      table.append(...sorted);
    };
  });
  let outcome = "all";
  const find = document.getElementById("find");
  const filter = () => {
    const text = find.value.toLowerCase();
    let left = 0;
    for (const b of bodies) {
      b.hidden = !((outcome === "all" || b.dataset.group === outcome) && b.rows[0].textContent.toLowerCase().includes(text));
      left += !b.hidden;
    }
    document.getElementById("left").textContent = `${left} of ${bodies.length}`;
  };
  document.querySelectorAll("#calls [data-outcome]").forEach(button => {
    button.onclick = () => {
      outcome = button.dataset.outcome;
      document.querySelectorAll("#calls [data-outcome]").forEach(x => x.setAttribute("aria-pressed", x === button));
      filter();
    };
  });
  find.oninput = filter;
  document.querySelector("#calls .filters").hidden = false;
  filter();
  const open = (body, show) => {
    const button = body.querySelector("button");
    button.setAttribute("aria-expanded", show);
    if (show && body.rows.length === 1) details(body);
    if (body.rows.length > 1) body.rows[1].hidden = !show;
  };
  for (const b of bodies) b.querySelector("button").onclick = () => open(b, b.rows.length === 1 || b.rows[1].hidden);
  const follow = () => {
    const body = location.hash.startsWith("#call-") && document.getElementById(location.hash.slice(1));
    if (!body) return;
    body.hidden = false;
    open(body, true);
    body.scrollIntoView({ block: "center" });
  };
  addEventListener("hashchange", follow);
  follow();
}

function details(body) {
  const found = data.report.cases[+body.dataset.n], list = make("dl");
  const add = (term, text) => { if (text) list.append(make("dt", { textContent: term }), make("dd", { className: "mono", textContent: text })); };
  const pairs = x => Object.entries(x).map(([name, value]) => `${name}=${typeof value === "string" ? value : JSON.stringify(value)}`).join("  ");
  add("sizes", pairs(found.dims));
  add("parameters", pairs(found.params));
  if (found.worst) {
    const w = found.worst;
    add("worst element", `${w.output}[${Object.entries(w.index).map(x => x.join("=")).join(", ")}]`);
    add("found", String(w.got)); add("should be", String(w.expected));
    add("error", `${w.error}, tolerance ${w.tolerance}`);
  }
  add("beyond tolerance", found.elements ? `${found.failing.toLocaleString("en")} of ${found.elements.toLocaleString("en")} elements` : "");
  add("trouble", found.reason);
  const cell = make("td", { colSpan: 4 }, list);
  body.append(make("tr", { className: "more" }, cell));
  for (const shown of data.maps[body.dataset.n] || []) {
    const gallery = make("div", { className: "pictures gap" });
    gallery.dataset.pictures = JSON.stringify(shown);
    cell.append(gallery);
    place(gallery);
  }
}

/* ---- copying, saving ------------------------------------------------------------------------------------------------------------ */
document.querySelectorAll("[data-copies]").forEach(button => {
  button.hidden = false;
  button.onclick = async () => {
    const from = document.getElementById(button.dataset.copies);
    try { await navigator.clipboard.writeText(from.textContent); } catch {
      getSelection().selectAllChildren(from);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };
});
const json = document.getElementById("json");
if (json) {
  json.hidden = false;
  json.onclick = () => {
    const link = make("a", { download: "report.json", href: URL.createObjectURL(new Blob([JSON.stringify(data.report, null, 2)], { type: "application/json" })) });
    link.click();
  };
}

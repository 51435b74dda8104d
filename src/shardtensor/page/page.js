"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const state = { ...data.start };
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const filled = (key) => key.replace(/\{(\w+)\}/g, (_, name) => state[name]);
  let printing = false;

  // the colours of the page, in which charts are drawn
  function themed(layout) {
    const style = getComputedStyle(document.documentElement);
    const text = printing ? "#111111" : style.getPropertyValue("--text").trim();
    const line = printing ? "#cccccc" : style.getPropertyValue("--line").trim();
    const made = { ...layout, height: undefined, showlegend: false, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: text, family: "system-ui, DejaVu Sans, sans-serif", size: 12 } };
    for (const axis of ["xaxis", "yaxis"]) {
      if (layout[axis]) made[axis] = { ...layout[axis], gridcolor: line, linecolor: line, zerolinecolor: line };
    }
    if (layout.meta && layout.meta.places) {
      const x = layout.meta.places[Number(state[layout.meta.variable])];
      made.shapes = layout.shapes.map((s, i) => i ? s : { ...s, x0: x, x1: x });
    }
    return made;
  }

  // of HTML, which wraps
  function legend(div, traces) {
    const named = traces.filter((t) => t.name);
    let list = div.previousElementSibling;
    if (!list || !list.classList.contains("legend")) {
      list = document.createElement("div");
      list.className = "legend";
      div.before(list);
    }
    list.hidden = named.length < 2;
    list.replaceChildren(...named.map((t) => {
      const [item, box] = [document.createElement("span"), document.createElement("i")];
      box.style.background = (t.marker || t.line).color;
      item.append(box, t.name);
      return item;
    }));
  }

  function draw(changed) {
    for (const div of all(".chart")) {
      const key = div.dataset.figure;
      const figure = data.figures[filled(key)];
      const follows = figure && figure.layout.meta && figure.layout.meta.variable === changed;
      if (changed && !key.includes(`{${changed}}`) && !follows) continue;
      div.hidden = !figure;
      if (figure) {
        div.style.height = `${figure.layout.height}px`;
        legend(div, figure.data);
        Plotly.react(div, figure.data, themed(figure.layout),
          { displaylogo: false, displayModeBar: false, responsive: true });
      }
    }
  }

  function show() {
    for (const p of all("[data-text]")) p.textContent = data.texts[filled(p.dataset.text)] || "";
    for (const part of all("[data-when]")) part.hidden = filled(part.dataset.when) !== part.dataset.is;
    for (const table of all("table[data-variable]")) {
      for (const row of all("tr[data-key]", table)) {
        const chosen = row.dataset.key === state[table.dataset.variable];
        row.classList.toggle("chosen", chosen);
        row.setAttribute("aria-selected", chosen);
      }
    }
  }

  function choose(name, value) {
    state[name] = value;
    show();
    draw(name);
  }

  function value(cell) {
    const text = cell.dataset.v === undefined ? cell.textContent : cell.dataset.v;
    return text !== "" && !isNaN(text) ? Number(text) : text;
  }

  function sort(table, column, head) {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const th of all("th", table)) th.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [value(a.cells[column]), value(b.cells[column])];
      const numbers = typeof x === "number" && typeof y === "number";
      // numbers come before words, both ways
      if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
      return (numbers ? x - y : String(x).localeCompare(String(y))) * (down ? -1 : 1);
    });
    body.append(...rows);
  }

  function filter(block) {
    const search = block.querySelector("input[type=search]");
    const words = (search ? search.value : "").toLowerCase().split(/\s+/).filter(Boolean);
    const tags = all("input[data-only]:checked", block).map((box) => box.dataset.only);
    for (const row of block.querySelector("tbody").rows) {
      const text = row.textContent.toLowerCase();
      const has = (row.dataset.tags || "").split(" ");
      row.hidden = !(words.every((w) => text.includes(w)) && tags.every((t) => has.includes(t)));
    }
  }

  for (const table of all("table")) {
    all("th", table).forEach((head, i) =>
      head.firstElementChild.addEventListener("click", () => sort(table, i, head)));
    const variable = table.dataset.variable;
    for (const row of variable ? all("tr[data-key]", table) : []) {
      row.addEventListener("click", () => choose(variable, row.dataset.key));
      row.addEventListener("keydown", (e) => {
        if (e.key === "Enter" || e.key === " ") { e.preventDefault(); choose(variable, row.dataset.key); }
      });
    }
  }
  for (const block of all(".table")) {
    all("input", block).forEach((input) => input.addEventListener("input", () => filter(block)));
  }
  for (const radio of all("input[type=radio]")) {
    radio.addEventListener("change", () => choose(radio.name, radio.value));
  }
  for (const range of all("input[type=range]")) {
    const told = () => {
      const text = range.dataset.options.split("\n")[Number(range.value)];
      range.previousElementSibling.textContent = text;
      range.setAttribute("aria-valuetext", text);
    };
    range.addEventListener("input", () => { told(); choose(range.name, range.value); });
    told();
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  // on paper always dark on white, and as wide as the paper
  matchMedia("print").addEventListener("change", (e) => { printing = e.matches; draw(); });
  show();
  draw();
  document.documentElement.dataset.ready = "yes";
})();

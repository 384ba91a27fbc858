"use strict";
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const PER_PAGE = 20;

  // charts, drawn again when the scheme changes

  const draw = () => {
    const theme = dark.matches ? "dark" : "light";
    const drawn = [...document.querySelectorAll("[data-chart]")].map((place) =>
      vegaEmbed(place, data.charts[place.dataset.chart], {
        actions: false, renderer: "svg", ast: true, config: data.themes[theme], tooltip: { theme },
      })
    );
    Promise.all(drawn).then(() => document.body.setAttribute("data-drawn", String(drawn.length)));
  };
  dark.addEventListener("change", draw);
  draw();

  // samples

  const explorer = document.getElementById("explorer");
  if (!explorer) return;
  const at = (id) => document.getElementById(id);
  const make = (tag, text, className) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  };
  const signed = (value) => {
    if (value === undefined) return "–";
    const size = Math.abs(value);
    const text = size >= 0.1 ? size.toFixed(3) : size === 0 ? "0" : size >= 1e-5 ? size.toFixed(6 - Math.max(0, Math.floor(Math.log10(size)) + 4)) : size.toExponential(1);
    return (value < 0 ? "−" : "+") + text;
  };
  const state = { ability: data.abilities[0], source: "", words: "", key: "phi", down: false, page: 0 };
  const haystack = new Map();
  for (const [id, sample] of Object.entries(data.samples))
    haystack.set(id, [id, sample.source, sample.prompt, sample.response].join("\n").toLowerCase());

  const listed = () => [...data.lists[state.ability].helpful, ...data.lists[state.ability].harmful];
  const value = (id) => {
    if (state.key === "id") return id;
    return state.key === "phi" ? data.samples[id].phi[state.ability] : data.samples[id][state.key];
  };
  const chosen = () => {
    const ids = listed().filter((id) => (!state.source || data.samples[id].source === state.source) && haystack.get(id).includes(state.words));
    const turn = state.down ? -1 : 1;
    return ids.sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === y) return data.samples[a].phi[state.ability] - data.samples[b].phi[state.ability];
      return (x < y ? -1 : 1) * turn;
    });
  };

  const heat = (sample) => {
    const scores = sample.heat.phi[state.ability];
    const largest = Math.max(...scores.map(Math.abs)) || 1;
    const node = make("div", undefined, "text heat");
    node.dir = "auto";
    sample.heat.text.forEach((text, i) => {
      const token = make("span", text, scores[i] > 0 ? "harms" : "helps");
      token.style.setProperty("--weight", `${Math.round((70 * Math.abs(scores[i])) / largest)}%`);
      token.title = `${signed(scores[i])} nats`;
      node.append(token);
    });
    return node;
  };
  const part = (name, text) => {
    const node = make("div", text, "text");
    node.dir = "auto";
    return [make("span", name, "what"), node];
  };
  const opened = (id) => {
    const sample = data.samples[id], box = make("div");
    if (sample.missing) return [make("p", "The text of this sample is not in samples.parquet.", "aside")];
    box.append(...part("prompt", sample.prompt), ...part("response", sample.response));
    if (sample.heat && sample.heat.phi[state.ability]) {
      const count = sample.heat.draws[state.ability];
      box.append(make("span", `tokens: blue helps ${state.ability}, orange harms it; summed over ${count} of ${sample.draws} draws`, "what"), heat(sample));
    }
    const all = data.abilities.filter((name) => name in sample.phi).map((name) => `${name} ${signed(sample.phi[name])}`);
    box.append(make("span", `on every ability, nats: ${all.join(", ")}`, "what"));
    return [box];
  };
  const row = (id, largest) => {
    const sample = data.samples[id], phi = sample.phi[state.ability], line = make("tr");
    line.dataset.id = id;
    const number = make("td", signed(phi));
    const bar = make("span", undefined, phi > 0 ? "bar harms" : "bar");
    bar.style.width = `${Math.max(2, (100 * Math.abs(phi)) / largest)}%`;
    number.append(bar);
    const cell = make("td"), details = make("details"), head = make("summary");
    const snippet = make("span", [sample.prompt, sample.response].filter(Boolean).join(" → ").slice(0, 400), "snippet");
    snippet.dir = "auto";
    head.append(make("code", id), snippet);
    details.append(head);
    details.addEventListener("toggle", () => {
      if (details.open && details.children.length === 1) details.append(...opened(id));
    });
    cell.append(details);
    line.append(number, make("td", sample.source), make("td", `${sample.draws}×`, "draws"), cell);
    return line;
  };

  const show = () => {
    const ids = chosen(), pages = Math.max(1, Math.ceil(ids.length / PER_PAGE));
    state.page = Math.min(state.page, pages - 1);
    const first = state.page * PER_PAGE, some = ids.slice(first, first + PER_PAGE);
    const largest = Math.max(1e-30, ...listed().map((id) => Math.abs(data.samples[id].phi[state.ability])));
    at("rows").replaceChildren(...some.map((id) => row(id, largest)));
    const { helpful, harmful, num_helpful, num_harmful } = data.lists[state.ability];
    at("shown").textContent =
      `${ids.length} of the ${helpful.length + harmful.length} samples held here; in the run ` +
      `${num_helpful.toLocaleString("en")} helped ${state.ability} and ${num_harmful.toLocaleString("en")} harmed it.`;
    at("page").textContent = ids.length ? `${first + 1} to ${first + some.length} of ${ids.length}` : "nothing found";
    at("previous").disabled = state.page === 0;
    at("next").disabled = state.page >= pages - 1;
    for (const head of explorer.querySelectorAll("th[data-key]")) {
      const here = head.dataset.key === state.key;
      head.querySelector("span").textContent = here ? (state.down ? "↓" : "↑") : "";
      if (here) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
  };
  const set = (changes) => { Object.assign(state, { page: 0 }, changes); show(); };
  const offer = (select, values, every) => {
    if (every) select.append(new Option(every, ""));
    for (const text of values) select.append(new Option(text, text));
  };
  offer(at("pick-ability"), data.abilities);
  offer(at("pick-source"), [...new Set(Object.values(data.samples).map((sample) => sample.source))].sort(), "all");
  at("pick-ability").addEventListener("change", (event) => set({ ability: event.target.value }));
  at("pick-source").addEventListener("change", (event) => set({ source: event.target.value }));
  at("search").addEventListener("input", (event) => set({ words: event.target.value.toLowerCase() }));
  explorer.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  at("previous").addEventListener("click", () => set({ page: state.page - 1 }));
  at("next").addEventListener("click", () => set({ page: state.page + 1 }));
  for (const head of explorer.querySelectorAll("th[data-key]"))
    head.querySelector("button").addEventListener("click", () => {
      const key = head.dataset.key;
      set({ key, down: key === state.key ? !state.down : key === "draws" });
    });
  explorer.hidden = false;
  show();
})();

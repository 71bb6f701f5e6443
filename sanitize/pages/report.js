"use strict";
// Keys, captions and labels are hostile: they reach the page as textContent only, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const blocks = document.querySelectorAll("script.images");
  const parsed = new Map(); // block → its images, the last few used
  const rows = data.rows, total = rows.key.length;
  const find = (id) => document.getElementById(id);
  const selected = new Set(), marks = new Map();
  let matching = [], page = 0, exported = true, shown = -1;

  function make(name, properties = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(properties)) {
      if (key in element) element[key] = value; else element.setAttribute(key, value);
    }
    element.append(...children);
    return element;
  }

  const shorten = (text, length) => (text.length > length ? text.slice(0, length - 1) + "…" : text);
  const number = (value) => (value === null ? "–" : Number(value.toPrecision(4)).toString());
  const campaignName = (row) => {
    const campaign = rows.campaign[row];
    return campaign >= 0 ? data.campaigns[campaign] : campaign === -1 ? "single" : "";
  };

  // ------------------------------------------------------------ images, parsed when a page first needs them

  function images(row) {
    const block = Math.floor(row / data.block);
    if (!parsed.has(block)) {
      if (parsed.size >= 64) parsed.delete(parsed.keys().next().value);
      parsed.set(block, JSON.parse(blocks[block].textContent));
    }
    return parsed.get(block)[row % data.block];
  }

  function picture(base64, text, row) {
    if (!base64) return make("div", { className: "blank" }, shorten(rows.missing[row] || "no picture", 120));
    const image = make("img", { src: "data:image/webp;base64," + base64, alt: text, decoding: "async" });
    if (rows.side[row] <= 64) image.className = "small-image";
    return image;
  }

  function pair(row, name) {
    const [image, made] = images(row);
    return [["image", image], ["decoded", made]].map(([caption, base64]) =>
      make("figure", {}, picture(base64, caption + " of " + shorten(name, 80), row), make("figcaption", {}, caption)));
  }

  // ------------------------------------------------------------ filter and sort

  const collator = new Intl.Collator(undefined, { numeric: true });
  const texts = new Array(total); // what the text filter looks in, made when it is first used
  const searched = (row) => texts[row] ??=
    [rows.key[row], data.shards[rows.shard[row]], rows.label[row], rows.caption[row]].join("\n").toLowerCase();
  const orders = {
    score: (row) => rows.score[row] ?? -Infinity,
    cut: (row) => (rows.score[row] === null ? Infinity : Math.abs(rows.score[row] - data.threshold)),
    key: (row) => rows.key[row], label: (row) => rows.label[row], caption: (row) => rows.caption[row],
    shard: (row) => data.shards[rows.shard[row]],
    campaign: (row) => (rows.campaign[row] < 0 ? 1e9 - rows.campaign[row] : rows.campaign[row]),
  };

  function accepts() {
    const text = find("text").value.trim().toLowerCase(), decision = find("decision").value;
    const campaign = find("campaign").value, status = find("status").value, mark = find("mark").value;
    return (row) =>
      (!text || searched(row).includes(text)) &&
      (!decision || (decision === "near" ? rows.near[row] : (decision === "removed") === Boolean(rows.removed[row]))) &&
      (!campaign || String(rows.campaign[row]) === campaign) &&
      (!status || data.statuses[rows.status[row]] === status) &&
      (!mark || (mark === "selected" ? selected.has(row) : (marks.get(row) ?? "none") === mark));
  }

  function refresh() {
    const accepted = accepts(), [name, sign] = [find("order").value.slice(0, -1), find("order").value.slice(-1)];
    const value = orders[name], turn = sign === "-" ? -1 : 1;
    const compare = (a, b) => (typeof a === "string" ? collator.compare(a, b) : a < b ? -1 : a > b ? 1 : 0);
    matching = [];
    for (let row = 0; row < total; row++) if (accepted(row)) matching.push(row);
    const sortable = matching.map((row) => { // long texts are compared by their beginnings, or sorting would take seconds
      const found = value(row);
      return [typeof found === "string" ? found.slice(0, 256) : found, row];
    });
    matching = sortable.sort((a, b) => turn * compare(a[0], b[0]) || a[1] - b[1]).map(([, row]) => row);
    page = 0;
    draw();
  }

  // ------------------------------------------------------------ the grid

  function tile(row) {
    const key = rows.key[row], name = shorten(key, 160);
    const box = make("input", { type: "checkbox", checked: selected.has(row) });
    box.setAttribute("aria-label", "Select " + shorten(key, 80));
    box.disabled = !rows.whole[row];
    const element = make("li", { className: "tile" + (selected.has(row) ? " selected" : "") });
    box.addEventListener("change", () => {
      if (box.checked) selected.add(row); else selected.delete(row);
      element.classList.toggle("selected", box.checked);
      count();
    });
    const open = make("button", { type: "button", className: "pair" }, ...pair(row, key));
    open.setAttribute("aria-label", "Details of " + shorten(key, 80));
    open.addEventListener("click", () => detail(row));
    element.append(open,
      make("p", { className: "key" }, make("bdi", {}, name)),
      make("div", { className: "line" },
        make("label", {}, box, "score " + number(rows.score[row])), decision(row), ...badges(row)));
    if (rows.label[row]) element.append(make("p", { className: "soft" }, "label ", make("bdi", {}, rows.label[row])));
    if (rows.caption[row]) element.append(make("p", {}, make("bdi", {}, shorten(rows.caption[row], 160))));
    if (data.reasons[rows.reason[row]]) element.append(make("p", { className: "soft" }, shorten(data.reasons[rows.reason[row]], 200)));
    element.append(make("p", { className: "soft" }, make("bdi", {}, data.shards[rows.shard[row]])));
    return element;
  }

  const decision = (row) => rows.removed[row] === null ? make("span", { className: "badge" }, "not decided")
    : make("span", { className: "badge " + (rows.removed[row] ? "removed" : "kept") }, rows.removed[row] ? "removed" : "kept");

  function badges(row) {
    const found = [];
    if (campaignName(row)) found.push(make("span", { className: "badge" }, campaignName(row)));
    if (marks.has(row)) found.push(make("span", { className: "badge marked" }, marks.get(row)));
    return found;
  }

  function draw() {
    const size = Number(find("size").value), pages = Math.max(1, Math.ceil(matching.length / size));
    page = Math.min(Math.max(page, 0), pages - 1);
    find("grid").replaceChildren(...matching.slice(page * size, (page + 1) * size).map(tile));
    find("page").textContent = `page ${page + 1} of ${pages}`;
    find("previous").disabled = page === 0;
    find("next").disabled = page === pages - 1;
    count();
  }

  function count() {
    find("count").textContent =
      `${matching.length} of ${total} shown, ${selected.size} selected, ${marks.size} marked`;
    for (const id of ["mark-release", "mark-remove", "mark-none", "select-none"]) find(id).disabled = !selected.size;
    find("export").disabled = !marks.size;
  }

  // ------------------------------------------------------------ one sample

  function detail(row) {
    shown = row;
    const dialog = find("detail"), step = (by) => {
      const place = matching.indexOf(shown) + by;
      if (place >= 0 && place < matching.length) detail(matching[place]);
    };
    const buttons = make("div", { className: "buttons" });
    for (const [text, action] of [["◀ previous", () => step(-1)], ["next ▶", () => step(1)], ["release", () => mark("release", [row])],
      ["remove", () => mark("remove", [row])], ["close", () => dialog.close()]]) {
      const button = make("button", { type: "button" }, text);
      button.addEventListener("click", action);
      if (["release", "remove"].includes(text)) button.disabled = !rows.whole[row];
      buttons.append(button);
    }
    const facts = [["shard", data.shards[rows.shard[row]]], ["index", rows.index[row]], ["score", number(rows.score[row])],
      ["decision", rows.removed[row] === null ? "not decided" : rows.removed[row] ? "removed" : "kept"], ["mark", marks.get(row) ?? "none"],
      ["campaign", campaignName(row) || "not grouped"], ["reason", data.reasons[rows.reason[row]] || "–"], ["status", data.statuses[rows.status[row]]],
      ["size", `${rows.width[row]} × ${rows.height[row]} pixels`], ["label", rows.label[row] || "–"], ["caption", rows.caption[row] || "–"],
      ["SHA-256 of the image", rows.sha256[row] || "–"],
      ...data.statistics.filter((name) => rows.statistics[name][row] !== null).map((name) => [name === "score" ? "score of pass 1" : name, number(rows.statistics[name][row])])];
    const list = make("dl", { className: "record" });
    for (const [name, value] of facts) list.append(make("dt", {}, name), make("dd", { className: "long" }, make("bdi", {}, String(value))));
    const title = make("h2", { id: "detail-title", className: "long" }, make("bdi", {}, rows.key[row]));
    dialog.replaceChildren(buttons, title, make("div", { className: "pair" }, ...pair(row, rows.key[row])), list);
    if (!dialog.open) dialog.showModal();
    buttons.children[1].focus();
  }

  find("detail").addEventListener("keydown", (event) => {
    const place = { ArrowLeft: 0, ArrowRight: 1 }[event.key];
    if (place !== undefined) find("detail").querySelector(".buttons").children[place].click();
  });

  // ------------------------------------------------------------ marks and export

  function mark(word, chosen) {
    for (const row of chosen) if (word) marks.set(row, word); else marks.delete(row);
    exported = marks.size === 0;
    draw();
    if (find("detail").open) detail(shown);
  }

  const quoted = (text) => '"' + text.replaceAll('"', '""') + '"';

  function csv() {
    const lines = [...marks].sort((a, b) => a[0] - b[0])
      .map(([row, word]) => [data.shards[rows.shard[row]], rows.key[row], word].map(quoted).join(","));
    return ["shard,key,word", ...lines, ""].join("\n");
  }

  find("export").addEventListener("click", () => {
    const link = make("a", { href: URL.createObjectURL(new Blob([csv()], { type: "text/csv" })), download: "decisions.csv" });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    exported = true;
  });
  addEventListener("beforeunload", (event) => { if (!exported) event.preventDefault(); });

  // ------------------------------------------------------------ the map

  const palette = ["#d1495b", "#2e86ab", "#e08e0b", "#3b8e5a", "#7d5ba6", "#c05299", "#4f7cac", "#8a6d3b", "#00897b", "#b23a48"];
  const colour = (campaign) => (campaign >= 0 ? palette[campaign % palette.length] : campaign === -1 ? "#808996" : "#aab6cc");
  const points = data.points; // x and y in [0, 1]; row = -1: a kept sample that is not listed
  const canvas = find("map");

  function drawMap() {
    const width = canvas.clientWidth, height = canvas.clientHeight, ratio = devicePixelRatio || 1;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    for (let i = 0; i < points.x.length; i++) {
      const campaign = points.campaign[i], size = campaign >= -1 ? 3 : 2;
      pen.globalAlpha = campaign >= -1 ? 0.85 : 0.7;
      pen.fillStyle = colour(campaign);
      pen.beginPath();
      pen.arc(12 + points.x[i] * (width - 24), height - 12 - points.y[i] * (height - 24), size, 0, 7);
      pen.fill();
    }
  }

  canvas.addEventListener("click", (event) => {
    const x = (event.offsetX - 12) / (canvas.clientWidth - 24), y = (canvas.clientHeight - 12 - event.offsetY) / (canvas.clientHeight - 24);
    let best = -1, distance = 0.02 ** 2;
    for (let i = 0; i < points.x.length; i++) {
      const found = (points.x[i] - x) ** 2 + (points.y[i] - y) ** 2;
      if (points.row[i] >= 0 && found < distance) [best, distance] = [points.row[i], found];
    }
    if (best >= 0) detail(best);
  });

  // ------------------------------------------------------------ wiring

  const option = (value, text) => make("option", { value: String(value) }, text);
  data.campaigns.forEach((name, campaign) => find("campaign").append(option(campaign, name)));
  if (rows.campaign.includes(-1)) find("campaign").append(option(-1, "singles"));
  data.statuses.forEach((status) => find("status").append(option(status, status)));
  for (const id of ["text", "decision", "campaign", "status", "mark", "order"]) find(id).addEventListener("change", refresh);
  let waiting = 0;
  find("text").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(refresh, 120); });
  find("size").addEventListener("change", () => { page = 0; draw(); });
  find("previous").addEventListener("click", () => { page--; draw(); });
  find("next").addEventListener("click", () => { page++; draw(); });
  find("select-all").addEventListener("click", () => { matching.forEach((row) => rows.whole[row] && selected.add(row)); draw(); });
  find("select-none").addEventListener("click", () => { selected.clear(); draw(); });
  for (const [id, word] of [["mark-release", "release"], ["mark-remove", "remove"], ["mark-none", ""]])
    find(id).addEventListener("click", () => {
      const chosen = [...selected];
      selected.clear(); // else the next mark would take these along, though they may be on another page
      mark(word, chosen);
    });
  function reset() {
    for (const id of ["text", "decision", "campaign", "status", "mark"]) find(id).value = "";
    find("order").value = "score-";
  }
  find("reset").addEventListener("click", () => { reset(); refresh(); });
  for (const button of document.querySelectorAll("[data-show], [data-select]")) {
    button.addEventListener("click", () => {
      reset();
      find("campaign").value = button.dataset.show ?? button.dataset.select;
      refresh();
      if (button.dataset.select) { matching.forEach((row) => rows.whole[row] && selected.add(row)); draw(); }
      find("samples").scrollIntoView();
      find("campaign").focus({ preventScroll: true });
    });
  }
  const groups = [[-2, "kept"], [-1, "single"], ...data.campaigns.map((name, campaign) => [campaign, name])];
  for (const [campaign, name] of groups.slice(0, 14)) {
    if (!points.campaign.includes(campaign)) continue;
    const swatch = make("span", { className: "swatch" });
    swatch.style.background = colour(campaign);
    find("map-legend").append(make("li", {}, swatch, name));
  }
  refresh();
  drawMap();
  addEventListener("resize", drawMap);
  document.documentElement.dataset.ready = Math.round(performance.now());
})();

// The script of page.html. DATA is what page.py has read.

const NAMES = Object.keys(DATA.scripts);
const CONTEXT = 3; // lines that are shown beside a change
const $ = (id) => document.getElementById(id);
const shown = { a: 0, b: 0 }; // lines of A and of B
let current = -1; // the change to which the keys have led

// ---- What differs

// Two lists as stretches that are the same in both, or not.
function align(a, b, comparator) {
  const rest = { a: [...a], b: [...b] };
  const stretches = [];
  for (const part of Diff.diffArrays(a, b, { comparator })) {
    const same = !part.added && !part.removed;
    if (stretches.at(-1)?.same !== same) stretches.push({ same, a: [], b: [], names: [] });
    if (!part.added) stretches.at(-1).a.push(...rest.a.splice(0, part.count));
    if (!part.removed) stretches.at(-1).b.push(...rest.b.splice(0, part.count));
  }
  return stretches;
}

// Neighbours that are the same in both scripts become one.
function join(stretches) {
  const joined = [];
  for (const part of stretches) {
    const last = joined.at(-1);
    if (part.same && last?.same) {
      last.a.push(...part.a);
      last.names.push(...part.names);
    } else {
      joined.push(part);
    }
  }
  return joined;
}

// The stretches of a section. Definitions of the same name face each other.
function compareSections(a, b) {
  const stretches = align(Object.keys(a), Object.keys(b)).flatMap((part) => {
    if (!part.same) {
      const lines = { a: part.a.flatMap((name) => a[name]), b: part.b.flatMap((name) => b[name]) };
      return [{ same: false, ...lines }];
    }
    return part.a.flatMap((name) => {
      const inner = align(a[name], b[name]);
      if (name && inner.every((stretch) => stretch.same)) inner[0].names.push(name);
      return inner;
    });
  });
  return join(stretches);
}

function compareScripts(a, b) {
  const sections = Object.entries(DATA.scripts[a]).map(([title, definitions]) => {
    const stretches = compareSections(definitions, DATA.scripts[b][title]);
    const same = stretches.every((part) => part.same);
    return { same, names: [title], a: [...stretches[0].a], stretches };
  });
  return join(sections);
}

// The words, spaces and tags of a line.
function split(line) {
  return DATA.lines[line].match(/<.*?>|&.*?;|\w+|\s+|./g) ?? [];
}

function areSimilar(a, b) {
  const words = [a, b].map((line) => split(line).filter((word) => /^\w/.test(word)));
  const common = words[0].filter((word) => words[1].includes(word));
  return 3 * common.length > words[0].length + words[1].length;
}

// ---- Code as HTML

function showLine(side, line, marks = []) {
  if (line === undefined) return '<div class="none"></div>';
  shown[side] += 1;
  const words = split(line).map((word, i) => {
    return marks[i] && word[0] !== "<" ? `<mark>${word}</mark>` : word;
  });
  return `<div class="${side}" data-number="${shown[side]}">${words.join("")}</div>`;
}

function showRow(a, b, isSimilar) {
  const words = isSimilar ? align(split(a), split(b)) : [];
  const marks = (side) => words.flatMap((part) => part[side].map(() => !part.same));
  return showLine("a", a, marks("a")) + showLine("b", b, marks("b"));
}

function showBlock(kind, rows) {
  return `<div class="lines ${kind}">${rows.join("")}</div>`;
}

function showFold(names, rows) {
  const start = names.length ? `${names.join(", ")}: ` : "";
  const title = `${start}the same ${rows.length} lines in both`;
  return `<details><summary class="fold">${title}</summary>${showBlock("same", rows)}</details>`;
}

function showSame({ a, names }, first, last) {
  const rows = a.map((line) => showRow(line, line));
  if (last - first < 5) return showBlock("same", rows);
  const fold = showFold(names, rows.slice(first, last));
  return showBlock("same", rows.slice(0, first)) + fold + showBlock("same", rows.slice(last));
}

function showChange(change) {
  const rows = align(change.a, change.b, areSimilar).flatMap(({ a, b, same }) => {
    const length = Math.max(a.length, b.length);
    return Array.from({ length }, (_, i) => showRow(a[i], b[i], same));
  });
  return showBlock("change", rows);
}

function showSection(section) {
  if (section.same) return showSame(section, 0, section.a.length);
  const parts = section.stretches.map((part, i) => {
    const first = i === 0 ? 0 : CONTEXT;
    const after = i === section.stretches.length - 1 ? 0 : CONTEXT;
    return part.same ? showSame(part, first, part.a.length - after) : showChange(part);
  });
  return `<details open><summary>${section.names}</summary>${parts.join("")}</details>`;
}

function showDiff(a, b) {
  const lesson = DATA.lessons.find((lesson) => lesson[0] === a && lesson[1] === b);
  const title = `${a}.py and ${b}.py: ${DATA.counts[a][b]} changed lines`;
  const sections = compareScripts(a, b).map(showSection);
  return `<h1>${title}</h1><p>${lesson?.[2] ?? ""}</p>${sections.join("")}`;
}

function showAlone(name) {
  const sections = Object.entries(DATA.scripts[name]).map(([title, definitions]) => {
    const rows = Object.values(definitions).flat().map((line) => showLine("a", line));
    return `<details open><summary>${title}</summary>${showBlock("alone", rows)}</details>`;
  });
  return `<h1>${name}.py</h1>${sections.join("")}`;
}

// ---- The overview

function showFamily() {
  const rows = NAMES.map((a) => {
    const cells = NAMES.map((b) => {
      const count = DATA.counts[a][b];
      const shade = `background: rgb(80 140 230 / ${count / 400})`;
      return `<td style="${shade}"><a href="#${a}/${b}">${count}</a></td>`;
    });
    return `<tr><th><a href="#${a}">${a}.py</a></th>${cells.join("")}</tr>`;
  });
  return `<tr><th></th><th>${NAMES.join("</th><th>")}</th></tr>${rows.join("")}`;
}

function showMethods() {
  const heads = DATA.tasks.map(({ name }, i) => {
    const label = name.replace(", ", "<br>");
    return `<th><label><input type="radio" name="task" value="${i}"><br>${label}</label></th>`;
  });
  const looks = Object.assign({}, ...DATA.tasks.map((task) => task.lines));
  const rows = Object.entries(looks).map(([name, { colour, dash }]) => {
    const cells = DATA.tasks.map((task) => `<td>${task.lines[name]?.success ?? ""}</td>`);
    return `<tr><th><label><input type="checkbox" value="${name}" checked>
      <svg width="36" height="8"><path d="M0 4H36" stroke="${colour}" stroke-width="3"
      stroke-dasharray="${dash}"/></svg> ${name}</label></th>${cells.join("")}</tr>`;
  });
  return `<tr><th></th>${heads.join("")}</tr>${rows.join("")}`;
}

function draw() {
  if ($("overview").hidden) return;
  const task = DATA.tasks[document.querySelector("[name=task]:checked").value];
  const boxes = [...document.querySelectorAll("[type=checkbox]:checked")];
  const lines = boxes.map((box) => task.lines[box.value]).filter(Boolean);
  const series = lines.map(({ colour, dash }) => {
    return { stroke: colour, dash, width: 3, spanGaps: true };
  });
  const font = "14px sans-serif";
  const options = {
    width: $("chart").clientWidth,
    height: 440,
    padding: [null, 30, null, null],
    legend: { show: false },
    scales: { x: { time: false }, y: { range: [0, 1] } },
    axes: ["updates", "success"].map((label) => ({ label, labelFont: font, font })),
    series: [{}, ...series],
  };
  $("told").textContent = `${task.name}: ${task.told}`;
  $("chart").replaceChildren();
  new uPlot(options, uPlot.join([[[0]], ...lines.map((line) => line.points)]), $("chart"));
}

// ---- The address, the menus, the keys

function show() {
  const names = location.hash.slice(1).split("/");
  const [a, b] = names.map((name) => (NAMES.includes(name) ? name : ""));
  shown.a = 0;
  shown.b = 0;
  current = -1;
  $("a").value = a;
  $("b").value = b ?? "";
  $("code").innerHTML = (b && showDiff(a, b)) || (a && showAlone(a));
  $("where").textContent = `${document.querySelectorAll(".change").length} changes`;
  $("steps").hidden = !b;
  $("overview").hidden = a !== "";
  draw();
  scrollTo(0, 0);
}

function step(by) {
  const changes = [...document.querySelectorAll(".change")];
  if (!changes.length) return;
  changes[current]?.classList.remove("current");
  current = Math.min(Math.max(current + by, 0), changes.length - 1);
  changes[current].classList.add("current");
  changes[current].closest("details").open = true;
  changes[current].scrollIntoView();
  $("where").textContent = `change ${current + 1} of ${changes.length}`;
}

for (const side of ["a", "b"]) {
  $(side).innerHTML = `<option></option><option>${NAMES.join("</option><option>")}</option>`;
  $(side).onchange = () => {
    const [a, b] = [$("a").value, $("b").value];
    if (a) location.hash = b ? `${a}/${b}` : a;
  };
}
const lessons = DATA.lessons.map(([a, b, sentence]) => {
  return `<li><a href="#${a}/${b}">${a}.py, ${b}.py</a>: ${sentence}</li>`;
});
$("lessons").innerHTML = lessons.join("");
$("family").innerHTML = showFamily();
$("methods").innerHTML = showMethods();
$("methods").onchange = draw;
document.querySelector("[name=task]").checked = true;
$("back").onclick = () => step(-1);
$("on").onclick = () => step(1);
onkeydown = (event) => {
  const isChoosing = event.target.matches("select, input"); // there the arrows choose
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "n" || (event.key === "ArrowRight" && !isChoosing)) step(1);
  if (event.key === "p" || (event.key === "ArrowLeft" && !isChoosing)) step(-1);
};
onhashchange = show;
onresize = draw;
show();

// All that moves. Without it the page shows the same figures, unsorted, and the last frame of each film.
"use strict";
document.documentElement.classList.add("js");

for (const slider of document.querySelectorAll(".slider")) {
  const films = document.getElementById(slider.dataset.films);
  const input = slider.querySelector("input");
  const output = slider.querySelector("output");
  const play = slider.querySelector("button");
  const names = JSON.parse(slider.dataset.names);
  let timer = 0;
  const show = () => {
    films.style.setProperty("--frame", input.value);
    output.value = names[input.value];
    input.setAttribute("aria-valuetext", names[input.value]);
  };
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
  };
  const advance = () => {
    input.stepUp();
    show();
    if (input.value === input.max) stop();
  };
  input.addEventListener("input", () => { stop(); show(); });
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (input.value === input.max) input.value = 0;
    show();
    timer = setInterval(advance, 450);
    play.textContent = "Pause";
  });
  show();
}

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const collator = new Intl.Collator(undefined, { numeric: true });
  const key = (row, column) => row.cells[column].dataset.key ?? row.cells[column].textContent;
  const compare = (a, b) => (isNaN(a) || isNaN(b) ? collator.compare(a, b) : a - b);
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const first = head.classList.contains("num") ? "descending" : "ascending";
      const second = first === "ascending" ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? second : first;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      body.append(...[...body.rows].sort((a, b) => sign * compare(key(a, column), key(b, column))));
    });
  });
}

for (const tools of document.querySelectorAll(".tools")) {
  const rows = [...document.getElementById(tools.dataset.rows).tBodies[0].rows];
  const search = tools.querySelector("input");
  const output = tools.querySelector("output");
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    output.value = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  };
  search.addEventListener("input", filter);
  filter();
}

// A layer's drawer: the keyboard goes into it, and comes back to where it was.
let opener = null;
const opened = () => document.querySelector(".layer:target");
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#layer-']");
  if (link) opener = link;
});
addEventListener("hashchange", () => {
  const layer = opened();
  if (layer) layer.focus({ preventScroll: true });
});
const close = () => {
  const top = scrollY;
  location.hash = "#";
  history.replaceState(null, "", location.pathname + location.search);
  scrollTo({ top, behavior: "instant" });
  opener?.focus({ preventScroll: true });
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && opened()) close();
});
for (const link of document.querySelectorAll(".layer .close")) {
  link.addEventListener("click", (event) => { event.preventDefault(); close(); });
}

for (const button of document.querySelectorAll(".copy")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.of).textContent);
    button.textContent = "Copied";
  });
}

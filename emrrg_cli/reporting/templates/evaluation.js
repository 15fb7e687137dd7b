"use strict";
(() => {
  const list = document.getElementById("studies");
  const studies = [...list.children];
  const texts = new Map(studies.map((study) => [study, study.textContent.toLowerCase()]));
  const count = document.getElementById("count");
  const search = document.getElementById("search");
  const sort = document.getElementById("sort");

  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const study of studies) {
      study.hidden = !words.every((word) => texts.get(study).includes(word));
      shown += !study.hidden;
    }
    count.textContent = words.length ? `${shown} of ${studies.length} studies` : `${studies.length} studies`;
  });

  sort.addEventListener("change", () => {
    const down = sort.value.startsWith("-");
    const key = sort.value.replace("-", "");
    const value = (study) => (key === "id" ? study.dataset.id : Number(study.dataset[key]));
    const order = (a, b) => (key === "id" ? value(a).localeCompare(value(b), "en", { numeric: true }) : value(a) - value(b));
    studies.sort((a, b) => (down ? order(b, a) : order(a, b)) || a.dataset.order - b.dataset.order);
    list.append(...studies);
  });

  const root = document.documentElement;
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  const large = document.getElementById("large");
  list.addEventListener("click", (event) => {
    if (!event.target.matches("img.zoom")) return;
    large.firstElementChild.src = event.target.src;
    large.showModal();
  });
  large.addEventListener("click", () => large.close());
})();

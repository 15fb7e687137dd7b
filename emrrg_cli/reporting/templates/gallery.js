"use strict";
(() => {
  const get = (id) => document.getElementById(id);
  const list = get("studies");
  const studies = [...list.children];
  const large = get("large");
  const search = get("search");
  const finding = get("finding");
  const order = new Map(studies.map((study, place) => [study, place]));
  const texts = new Map(studies.map((study) => [study, `${study.dataset.name} ${study.querySelector(".text").textContent}`.toLowerCase()]));
  const findings = new Map(studies.map((study) => [study, study.dataset.findings.split("|").filter(Boolean)]));

  // -- which studies are shown ------------------------------------------------------------------------------------

  const counts = new Map();
  for (const names of findings.values()) for (const name of names) counts.set(name, (counts.get(name) || 0) + 1);
  for (const [name, count] of [...counts].sort()) finding.append(new Option(`${name} (${count})`, name));
  if (!studies.some((study) => "noted" in study.dataset)) get("noted").parentElement.hidden = true;

  const visible = () => studies.filter((study) => !study.hidden);
  const choose = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const study of studies) {
      study.hidden = !(
        words.every((word) => texts.get(study).includes(word)) &&
        (!finding.value || findings.get(study).includes(finding.value)) &&
        (!get("noted").checked || "noted" in study.dataset)
      );
    }
    const shown = visible().length;
    get("count").textContent = shown === studies.length ? `${shown} studies` : `${shown} of ${studies.length} studies`;
    get("nothing").hidden = shown > 0;
  };
  for (const [id, kind] of [["search", "input"], ["finding", "change"], ["noted", "change"]]) get(id).addEventListener(kind, choose);
  get("reset").addEventListener("click", () => {
    search.value = finding.value = "";
    get("noted").checked = false;
    choose();
  });
  choose();

  get("sort").addEventListener("change", (event) => {
    const sure = (study) => Number(study.dataset.confidence ?? -1);
    const by = {
      order: () => 0,
      low: (a, b) => sure(a) - sure(b),
      high: (a, b) => sure(b) - sure(a),
      name: (a, b) => a.dataset.name.localeCompare(b.dataset.name, "en", { numeric: true }),
    }[event.target.value];
    studies.sort((a, b) => by(a, b) || order.get(a) - order.get(b));
    list.append(...studies);
  });

  // -- where the model looked -------------------------------------------------------------------------------------

  // Only values above an even spread are drawn: a map without a peak does not change the film.
  const draw = (canvas, grid, values, peak) => {
    canvas.width = canvas.height = grid;
    const context = canvas.getContext("2d");
    const picture = context.createImageData(grid, grid);
    values.forEach((value, place) => {
      const heat = Math.min(1, Math.max(0, ((value / 255) * peak - 1) / (Math.max(peak, 4) - 1)));
      picture.data.set([255, 60 + 180 * heat, 20 + 40 * heat, 150 * Math.sqrt(heat)], 4 * place);
    });
    context.putImageData(picture, 0, 0);
  };
  const clear = (card) => {
    for (const canvas of card.querySelectorAll("canvas")) canvas.classList.remove("on");
    for (const one of card.querySelectorAll(".sentence.on")) one.classList.remove("on");
    const hint = card.querySelector(".hint");
    if (hint) hint.textContent = "";
  };
  const show = (sentence) => {
    const card = sentence.closest(".study");
    clear(card);
    sentence.classList.add("on");
    const grid = Number(card.dataset.grid);
    const peak = Number(sentence.dataset.peak);
    const bytes = Uint8Array.from(atob(sentence.dataset.map), (letter) => letter.charCodeAt(0));
    card.querySelectorAll(".film").forEach((film, view) => {
      const values = bytes.subarray(view * grid * grid, (view + 1) * grid * grid);
      if (values.length < grid * grid) return;
      const canvas = film.querySelector("canvas") || film.appendChild(document.createElement("canvas"));
      draw(canvas, grid, values, peak);
      canvas.classList.add("on");
    });
    const sure = "confidence" in sentence.dataset ? `Confidence of the sentence ${sentence.dataset.confidence}. ` : "";
    const spread = peak < 1.5 ? "Its map is spread almost evenly." : `The strongest patch has ${peak.toFixed(1)} times an even share.`;
    card.querySelector(".hint").textContent = sure + spread;
  };
  const back = (card) => {
    const pinned = card.querySelector(".sentence.pinned");
    if (pinned) show(pinned);
    else clear(card);
  };
  const mapped = (event) => event.target.closest?.(".sentence[data-map]");
  document.addEventListener("pointerover", (event) => {
    if (event.pointerType === "mouse" && mapped(event)) show(mapped(event));
  });
  document.addEventListener("pointerout", (event) => {
    const sentence = event.pointerType === "mouse" && mapped(event);
    if (sentence && !sentence.contains(event.relatedTarget)) back(sentence.closest(".study"));
  });
  document.addEventListener("focusin", (event) => {
    if (mapped(event)) show(mapped(event));
  });
  document.addEventListener("focusout", (event) => {
    if (mapped(event)) back(mapped(event).closest(".study"));
  });
  const pin = (sentence) => {
    const card = sentence.closest(".study");
    const before = card.querySelector(".sentence.pinned");
    before?.classList.remove("pinned");
    if (before !== sentence) sentence.classList.add("pinned");
    back(card);
  };

  // -- moving and enlarging ---------------------------------------------------------------------------------------

  let current = null;
  const mark = (study) => {
    current?.classList.remove("current");
    current = study;
    current?.classList.add("current");
  };
  const move = (step) => {
    const shown = visible();
    if (!shown.length) return;
    const place = shown.indexOf(current);
    mark(shown[place < 0 ? 0 : Math.min(shown.length - 1, Math.max(0, place + step))]);
    current.scrollIntoView({ block: "start" });
    if (large.open) enlarge(current);
    else current.focus({ preventScroll: true });
  };
  const enlarge = (study) => {
    mark(study);
    const copy = study.cloneNode(true);
    copy.classList.remove("current");
    large.replaceChildren(copy);
    if (!large.open) large.showModal();
    back(copy);
    copy.focus({ preventScroll: true });
  };
  const shrink = () => {
    if (large.open) large.close();
    large.replaceChildren();
    current?.focus({ preventScroll: true });
  };
  large.addEventListener("close", shrink);
  document.addEventListener("click", (event) => {
    const card = event.target.closest(".study");
    if (mapped(event)) pin(mapped(event));
    else if (event.target === large || (large.open && event.target.closest(".film"))) shrink();
    else if (card && event.target.closest(".film")) enlarge(card);
    else if (card && !large.open) mark(card);
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches("input[type=search], select");
    const step = { j: 1, ArrowDown: 1, ArrowRight: 1, k: -1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape" && event.target === search) {
      search.value = "";
      choose();
      search.blur();
    } else if (typing) {
      return;
    } else if (step) {
      event.preventDefault();
      move(step);
    } else if (event.key === "/" && !large.open) {
      event.preventDefault();
      search.focus();
      search.select();
    } else if (event.key === "Enter" && !event.target.matches("a, button, summary, input")) {
      event.preventDefault();
      if (large.open) shrink();
      else if (event.target.closest(".study") || current) enlarge(event.target.closest(".study") || current);
    } else if (event.key === "Escape" && !large.open) {
      for (const one of list.querySelectorAll(".sentence.pinned")) one.classList.remove("pinned");
      studies.forEach(clear);
    }
  });

  // -- looks ------------------------------------------------------------------------------------------------------

  get("shade").addEventListener("change", (event) => document.body.classList.toggle("shaded", event.target.checked));
  const root = document.documentElement;
  get("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
})();

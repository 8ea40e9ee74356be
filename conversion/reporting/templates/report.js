"use strict";

for (const slider of document.querySelectorAll(".slider")) {
  const { contexts, series } = JSON.parse(slider.dataset.memory);
  const input = slider.querySelector("input");
  const rows = slider.querySelectorAll("li");
  const show = () => {
    const place = Number(input.value);
    const most = Math.max(...series.map((one) => one.bytes[place]));
    slider.querySelector("output").textContent = contexts[place];
    input.setAttribute("aria-valuetext", `${contexts[place]} tokens`);
    series.forEach((one, index) => {
      rows[index].querySelector(".bytes").textContent = one.shown[place];
      rows[index].querySelector(".bar span").style.width = `${(100 * one.bytes[place]) / most}%`;
    });
  };
  input.addEventListener("input", show);
  show();
}

const collator = new Intl.Collator("en", { numeric: true });

function compare(one, other) {
  const numbers = [Number(one), Number(other)];
  return numbers.some(Number.isNaN) ? collator.compare(one, other) : numbers[0] - numbers[1];
}

function sortBy(table, column) {
  const headers = [...table.tHead.rows[0].cells];
  const descending = headers[column].getAttribute("aria-sort") === "ascending";
  headers.forEach((header) => header.removeAttribute("aria-sort"));
  headers[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
  const value = (row) => row.cells[column].dataset.value;
  const sign = descending ? -1 : 1;
  const rows = [...table.tBodies[0].rows].sort((one, other) => sign * compare(value(one), value(other)));
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    button.addEventListener("click", () => sortBy(table, column));
    header.append(button);
  });
}

addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
});

"use strict";
// Tables are sorted by their heads: numbers by value, words by alphabet, what is missing last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.setAttribute("aria-sort", "none");
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const sign = down ? -1 : 1;
      const keyed = [...body.rows].map((row) => {
        const cell = row.cells[column];
        return [cell.dataset.value === undefined ? null : Number(cell.dataset.value), cell.textContent, row];
      });
      const numeric = keyed.some(([value]) => value !== null);
      keyed.sort(([a, s], [b, t]) => {
        if (!numeric) return sign * s.localeCompare(t);
        if (a === null || b === null) return (a === null) - (b === null);
        return sign * (a - b);
      });
      body.append(...keyed.map(([, , row]) => row));
    });
  });
}

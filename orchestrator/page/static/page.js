// Shows what is new without losing one's place: asks for the same page again, and puts its content in.
"use strict";
const seconds = Number(document.body.dataset.refresh);
const here = () => location.origin + location.pathname + location.search; // no password, which fetch would refuse

async function refresh() {
  const writes = document.activeElement?.closest("form");
  if (document.hidden || writes || !getSelection().isCollapsed) return;
  try {
    const answer = await fetch(here(), { credentials: "same-origin", cache: "no-store" });
    if (!answer.ok) throw new Error(`the page answers ${answer.status}`);
    const found = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const name of ["header", "main"]) document.querySelector(name).replaceWith(found.querySelector(name));
    document.title = found.title;
  } catch {
    document.querySelector("header p")?.classList.add("stale");
  }
}

setInterval(refresh, 1000 * seconds);

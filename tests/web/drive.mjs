// Visits every page of the dashboard and reports what went wrong, as one JSON object on stdout.
//
// node drive.mjs '{"url": …, "chromium": …, "widths": [360, 1440], "themes": ["light", "dark"],
//                  "shots": DIR or "", "share": true}'

import { chromium } from "playwright-core";

const wanted = JSON.parse(process.argv[2]);
const PAGES = ["overview", "contributing", "jobs", "peers", "privacy"];
const report = {
  errors: [], violations: [], foreign: [], overflows: [], unnamed: [], cookies: 0, stored: 0,
  addresses: [], visited: 0, share: {}, limits: {}, locked: "", contrast: [],
};

const browser = await chromium.launch({
  executablePath: wanted.chromium,
  args: ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"],
});

function listen(page, where) {
  const host = new URL(wanted.url).host;
  page.on("console", (message) => {
    // Chromium reports each refused request; a wrong limit is refused on purpose.
    if (message.text().includes("status of 400") && message.location().url.endsWith("/v1/limits")) return;
    if (["error", "warning"].includes(message.type())) report.errors.push(`${where}: ${message.text()}`);
  });
  page.on("pageerror", (error) => report.errors.push(`${where}: ${error.message}`));
  page.on("request", (request) => {
    const url = new URL(request.url());
    if (url.host !== host && !["data:", "about:"].includes(url.protocol)) report.foreign.push(request.url());
    if (request.url().includes("token")) report.foreign.push("the key is in a request");
  });
}

async function open(width, theme) {
  const context = await browser.newContext({
    viewport: { width, height: width < 500 ? 780 : 900 },
    colorScheme: theme,
    deviceScaleFactor: 1,
  });
  const page = await context.newPage();
  await page.addInitScript(() => {
    globalThis.violations = [];
    addEventListener("securitypolicyviolation", (event) => {
      globalThis.violations.push(`${event.violatedDirective} ${event.blockedURI}`);
    });
  });
  listen(page, `${width} ${theme}`);
  await page.goto(wanted.url);
  await page.getByRole("switch").waitFor();
  await page.waitForFunction(() => !document.querySelector("[role=switch]").disabled);
  await page.getByRole("img").first().waitFor();
  return { context, page };
}

// Every control has a name for who can not see it, and text stands out from what is behind it.
function unnamed() {
  const controls = [...document.querySelectorAll("button, a[href], input, [role=switch], [role=img], progress, dialog[open]")];
  return controls
    .filter((one) => one.offsetParent !== null)
    .filter((one) => {
      const label = one.id && document.querySelector(`label[for="${one.id}"]`);
      const by = one.getAttribute("aria-labelledby");
      return !(one.getAttribute("aria-label") || one.textContent.trim() || label || by);
    })
    .map((one) => one.outerHTML.slice(0, 120));
}

// WCAG 2.1, 1.4.3: 4.5 to 1 for text of ordinary size.
function faint() {
  const channel = (value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const parts = (text) => (text.match(/[\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r / 255) + 0.7152 * channel(g / 255) + 0.0722 * channel(b / 255);
  const behind = (one) => {
    for (let at = one; at; at = at.parentElement) {
      const found = parts(getComputedStyle(at).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const found = new Set();
  for (const one of document.querySelectorAll("#app *")) {
    const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || one.offsetParent === null || one.disabled) continue;
    const [a, b] = [light(parts(getComputedStyle(one).color)), light(behind(one))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.add(`${ratio.toFixed(2)} ${one.className || one.tagName}`);
  }
  return [...found];
}

async function visit(page, where) {
  report.visited += 1;
  await page.waitForTimeout(wanted.settle_ms ?? 300);
  const wide = await page.evaluate(() => document.scrollingElement.scrollWidth - innerWidth);
  if (wide > 0) report.overflows.push(`${where}: ${wide} px`);
  report.unnamed.push(...(await page.evaluate(unnamed)).map((one) => `${where}: ${one}`));
  report.contrast.push(...(await page.evaluate(faint)).map((one) => `${where}: ${one}`));
  report.violations.push(...(await page.evaluate(() => globalThis.violations.splice(0))));
  report.addresses.push(page.url());
}

// A setting that is wrong says why beside itself; a right one is the node's at once.
async function changeLimit(page) {
  await page.locator('nav a[href="#/contributing"]').click();
  const field = page.getByLabel("Hours", { exact: true });
  await field.fill("not hours");
  await page.keyboard.press("Enter");
  await page.locator("#limit-hours-help.wrong").waitFor();
  report.limits.wrong = await page.locator("#limit-hours-help").textContent();
  await field.fill("22:00-07:00");
  await page.keyboard.press("Enter");
  await page.getByText("Saved.").waitFor();
  await page.waitForFunction(() => !document.querySelector("#limit-hours-help.wrong"));
  report.limits.value = await field.inputValue();
}

async function toEnd(page, width, theme) {
  // Plots have something to show.
  await page.waitForTimeout(wanted.first_ms ?? 0);
  for (const name of PAGES) {
    await page.locator(`nav a[href="#/${name}"]`).click();
    await page.waitForURL(`**/#/${name}`);
    if (name === "peers") await page.getByText(/ ms$|Nobody lends/).first().waitFor();
    await visit(page, `${name} ${width} ${theme}`);
    if (wanted.shots) {
      await page.screenshot({ path: `${wanted.shots}/${name}-${width}-${theme}.png` });
    }
  }
}

// By the keyboard alone: from the top of the page to the switch, and Space.
async function share(page) {
  await page.locator('nav a[href="#/overview"]').click();
  const control = page.getByRole("switch", { name: "Share this machine" });
  report.share.before = await control.getAttribute("aria-checked");
  await page.evaluate(() => document.querySelector(".skip").focus());
  let presses = 0;
  for (; presses < 30; presses += 1) {
    await page.keyboard.press("Tab");
    if (await page.evaluate(() => document.activeElement.getAttribute("role") === "switch")) break;
  }
  report.share.presses = presses + 1;
  await page.keyboard.press("Space");
  await page.waitForFunction(
    (old) => document.querySelector("[role=switch]").getAttribute("aria-checked") !== old, report.share.before,
  );
  report.share.after = await control.getAttribute("aria-checked");
  report.share.said = await page.locator(".said").textContent();
}

async function withoutKey() {
  const page = await (await browser.newContext()).newPage();
  listen(page, "without the key");
  await page.goto(new URL("/", wanted.url).href);
  report.locked = await page.locator("h1").textContent();
}

try {
  for (const width of wanted.widths) {
    for (const theme of wanted.themes) {
      const { context, page } = await open(width, theme);
      await toEnd(page, width, theme);
      if (wanted.share) {
        await share(page);
        if (wanted.limits) await changeLimit(page);
        wanted.share = false;
      }
      report.cookies += (await context.cookies()).length;
      report.stored += await page.evaluate(() => localStorage.length + sessionStorage.length);
      await context.close();
    }
  }
  await withoutKey();
} catch (error) {
  report.errors.push(`the drive ended: ${error.message}`);
} finally {
  await browser.close();
}
console.log(JSON.stringify(report));

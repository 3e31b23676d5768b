// A verifier and a signer of permits that share nothing with this project's own: written
// from docs/permits.md for Node, on the npm package jose.
//
//     node permits.mjs JOSE verify < permit-vectors.json   what it answers to each case, as JSON
//     node permits.mjs JOSE sign < permit-vectors.json     permits that it has signed, as JSON
//
// JOSE is the folder of the package.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [folder, task] = process.argv.slice(2);
const jose = await import(pathToFileURL(`${folder}/dist/webapi/index.js`));
const vectors = JSON.parse(readFileSync(0, "utf8"));

// RFC 8785: JavaScript writes numbers and texts as it wants them, and sorts as UTF-16.
function canonical(value) {
  if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  const members = Object.keys(value).sort().map((key) => `${JSON.stringify(key)}:${canonical(value[key])}`);
  return `{${members.join(",")}}`;
}

const digest = (value) => createHash("sha256").update(canonical(value), "utf8").digest("hex");

class Refused extends Error {}
const need = (holds, reason) => {
  if (!holds) throw new Refused(reason);
};
const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const isText = (value) => typeof value === "string" && value !== "";
const isTextList = (value, most) =>
  Array.isArray(value) && value.length >= 1 && value.length <= most && value.every(isText);
const hasMembers = (value, names, optional) =>
  isObject(value) &&
  names.every((name) => Object.hasOwn(value, name)) &&
  Object.keys(value).every((name) => names.includes(name) || optional.includes(name));

function isAct(value, most) {
  if (most === 0 || !hasMembers(value, ["sub"], ["act"]) || !isText(value.sub)) return false;
  return !Object.hasOwn(value, "act") || isAct(value.act, most - 1);
}

function isPermit(claims) {
  const details = claims.authorization_details;
  if (
    !hasMembers(
      claims,
      ["iss", "aud", "iat", "nbf", "exp", "jti", "txn", "sub", "scope", "authorization_details", "tctx"],
      ["act", "cnf", "req_wl"],
    ) ||
    !["iss", "aud", "jti", "txn", "sub"].every((name) => isText(claims[name])) ||
    !["iat", "nbf", "exp"].every((name) => Number.isSafeInteger(claims[name])) ||
    claims.nbf !== claims.iat ||
    typeof claims.scope !== "string" ||
    !Array.isArray(details) ||
    details.length !== 1
  )
    return false;
  const [detail] = details;
  const context = claims.tctx;
  if (
    !hasMembers(detail, ["type", "locations", "actions"], ["args_sha256", "identifier", "max_uses"]) ||
    detail.type !== "tool_call" ||
    canonical(detail.locations) !== canonical([claims.aud]) ||
    !Array.isArray(detail.actions) ||
    detail.actions.length !== 1 ||
    typeof detail.actions[0] !== "string" ||
    !hasMembers(context, ["tenant", "decision_id", "policy_revision", "ledger"], ["hold_id", "delegations"]) ||
    !Object.entries(context).every(([name, value]) => name === "delegations" || isText(value)) ||
    ("delegations" in context && !isTextList(context.delegations, 17)) ||
    ("identifier" in detail && !isText(detail.identifier))
  )
    return false;
  if ("args_sha256" in detail) {
    if (typeof detail.args_sha256 !== "string" || !/^[0-9a-f]{64}$/.test(detail.args_sha256)) return false;
    if ("max_uses" in detail && detail.max_uses !== 1) return false;
  } else {
    const uses = "max_uses" in detail ? detail.max_uses : 1;
    if (!Number.isSafeInteger(uses) || uses < 1 || uses > 1000 || "identifier" in detail) return false;
  }
  if ("act" in claims && !isAct(claims.act, 16)) return false;
  if ("req_wl" in claims && !isText(claims.req_wl)) return false;
  if (!("cnf" in claims)) return true;
  const cnf = claims.cnf;
  return hasMembers(cnf, ["x5t#S256"], []) && /^[A-Za-z0-9_-]{43}$/.test(String(cnf["x5t#S256"]));
}

const keys = jose.createLocalJWKSet(vectors.jwks);

async function verify(permit, question) {
  need(permit !== "", "permit_missing");
  need(permit.length <= 8192, "permit_invalid");
  // One spelling: what is decoded and written again is what was there.
  const segments = permit.split(".");
  need(
    segments.length === 3 &&
      segments.every((part) => Buffer.from(part, "base64url").toString("base64url") === part),
    "permit_invalid",
  );
  let claims;
  try {
    const header = jose.decodeProtectedHeader(permit);
    need(hasMembers(header, ["alg", "kid", "typ"], []), "permit_invalid");
    need(header.typ === "tool-permit+jwt" && typeof header.kid === "string", "permit_invalid");
    const { payload } = await jose.compactVerify(permit, keys, { algorithms: ["EdDSA"] });
    claims = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(payload));
  } catch {
    throw new Refused("permit_invalid");
  }
  need(isPermit(claims) && claims.iss === vectors.issuer, "permit_invalid");
  const [detail] = claims.authorization_details;
  const asked = digest(JSON.parse(question.arguments_json));
  need(claims.aud === question.audience, "permit_mismatch");
  need(detail.actions[0] === question.tool, "permit_mismatch");
  need(!("args_sha256" in detail) || detail.args_sha256 === asked, "permit_mismatch");
  need(question.tenant === undefined || claims.tctx.tenant === question.tenant, "permit_mismatch");
  need(!claims.cnf || claims.cnf["x5t#S256"] === question.certificate_sha256, "permit_mismatch");
  const leeway = vectors.leeway_seconds;
  need(claims.iat - leeway <= question.time && question.time < claims.exp + leeway, "permit_expired");
}

// What the package itself says to a permit, with nothing of ours: signature, type, issuer,
// audience, times.
async function plainly(permit, question) {
  await jose.jwtVerify(permit, keys, {
    algorithms: ["EdDSA"],
    typ: "tool-permit+jwt",
    issuer: vectors.issuer,
    audience: question.audience,
    requiredClaims: ["exp", "iat", "nbf", "jti", "sub", "tctx"],
    clockTolerance: vectors.leeway_seconds,
    currentDate: new Date(question.time * 1000),
  });
}

async function outcome(work) {
  try {
    await work();
    return "ok";
  } catch (error) {
    return error instanceof Refused ? error.message : (error.code ?? String(error));
  }
}

if (task === "verify") {
  const cases = [];
  for (const { permit, question } of vectors.cases) {
    cases.push({
      verifier: await outcome(() => verify(permit, question)),
      jose: await outcome(() => plainly(permit, question)),
    });
  }
  const digests = vectors.digests.map((each) => ({
    canonical: canonical(JSON.parse(each.arguments_json)),
    sha256: digest(JSON.parse(each.arguments_json)),
  }));
  console.log(JSON.stringify({ cases, digests }));
} else {
  const key = await jose.importJWK(vectors.signing_key, "EdDSA");
  const permits = [];
  for (const { permit, question, reason_code } of vectors.cases) {
    if (reason_code !== "ok") continue;
    const signed = await new jose.SignJWT(jose.decodeJwt(permit))
      .setProtectedHeader({ typ: "tool-permit+jwt", alg: "EdDSA", kid: vectors.signing_key.kid })
      .sign(key);
    permits.push({ permit: signed, question });
  }
  console.log(JSON.stringify(permits));
}

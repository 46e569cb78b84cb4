// Colours for code: one pass of one pattern per family of languages. Comments, strings, numbers and words, no grammar.

import { h } from "./dom.js";

const LONGEST = 50_000; // characters; longer code stays plain

const STRING = String.raw`"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'`;
const NUMBER = String.raw`\b(?:0[xXbBoO][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\b`;
const words = (list) => String.raw`\b(?:${list.trim().split(/\s+/).join("|")})\b`;

const C_WORDS = words(`
  abstract as async await auto bool break case catch char class const constexpr continue debugger default defer delete do
  double else enum export extends extern final finally float fn for from func function go if impl implements import in
  instanceof int interface let long loop match mod mut namespace new null nullptr of operator override package private
  protected pub public return self short signed sizeof static struct super switch template this throw trait true false try
  type typedef typename typeof undefined union unsafe unsigned use using var virtual void volatile where while yield`);
const PYTHON_WORDS = words(`
  False None True and as assert async await break case class continue def del elif else except finally for from global if
  import in is lambda match nonlocal not or pass raise return self try while with yield`);
const SHELL_WORDS = words(`case do done elif else esac export fi for function if in local return set then unset until while sudo`);
const SQL_WORDS = words(`
  add all alter and as asc between by case create cross default delete desc distinct drop else end exists from full group
  having in index inner insert into is join key left like limit not null on or order outer primary right select set table
  then union unique update values view when where with`);

const family = (comment, string, word, flags = "") => new RegExp(`(${comment})|(${string})|(${NUMBER})|(${word})`, `g${flags}`);
const C = family(String.raw`\/\/.*|\/\*[^]*?(?:\*\/|$)`, `${STRING}|\`(?:[^\`\\\\]|\\\\[^])*\``, C_WORDS);
const PYTHON = family("#.*", String.raw`"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)|${STRING}`, PYTHON_WORDS);
const SHELL = family(String.raw`(?<=^|\s)#.*`, STRING, SHELL_WORDS, "m");
const SQL = family(String.raw`--.*|\/\*[^]*?(?:\*\/|$)`, STRING, SQL_WORDS, "i");
const DATA = family(String.raw`(?<=^|\s)#.*`, STRING, words("true false null yes no on off"), "m");

const FAMILIES = [
  [C, "c h cc cpp c++ cxx hpp cs csharp cuda go java javascript js jsx kotlin kt mjs php rs rust scala swift ts tsx typescript dart css scss"],
  [PYTHON, "py python python3 ipython starlark"],
  [SHELL, "bash sh shell zsh console dockerfile makefile"],
  [SQL, "sql sqlite postgresql mysql"],
  [DATA, "json jsonc yaml yml toml ini"],
];
const BY_NAME = new Map(FAMILIES.flatMap(([pattern, names]) => names.split(" ").map((name) => [name, pattern])));
const CLASSES = ["code-comment", "code-string", "code-number", "code-word"];

/** The nodes of `code`; plain text where the language is not known. */
export function highlight(code, language) {
  const pattern = BY_NAME.get(language.toLowerCase());
  if (!pattern || code.length > LONGEST) return [document.createTextNode(code)];
  const nodes = [];
  let at = 0;
  for (const found of code.matchAll(pattern)) {
    if (!found[0]) continue;
    nodes.push(code.slice(at, found.index), h(`span.${CLASSES[found.slice(1).findIndex((group) => group !== undefined)]}`, {}, found[0]));
    at = found.index + found[0].length;
  }
  return [...nodes, code.slice(at)].map((node) => (typeof node === "string" ? document.createTextNode(node) : node)).filter((node) => node.textContent);
}

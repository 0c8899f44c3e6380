"""Builds docs/site: the code beside its notes, with the shapes and the pictures of a real forward pass.

    python -m docs.build [FOLDER]        (from the top of the repository)

The pages are made from the files themselves, which docs/pictures.py runs while docs/shapes.py watches: a page shows
what each shape comment was in that run, and a comment that does not fit ends the build with its line. `index.html`
is docs/index.md, with what README.md says about runs and results/claims.md; so are exercises and answers, if there.
"""

import ast
import html
import importlib
import io
import keyword
import re
import sys
import tokenize
from pathlib import Path

import torch

from docs import pictures
from docs.prose import PAGES, TITLES, card, markdown, marks, paragraphs
from docs.shapes import ROOT, Trace, comments

# The demo first; the others run lines that it leaves out.
RUNS = dict(mfm_mae=["", "--fusion attention", "--target lowpass", "--augment rrc"],
            beyond_masking=["", *(f"--task {task}" for task in ("mask", "zoom_in", "zoom_out", "distort", "blur",
                                                                 "decolor", "mask+zoom_out", "mask+distort"))],
            cae_v2=["", "--supervise visible", "--mask random"])


# -- code
class Source:
    """A file of ours: its lines, definitions and functions with places for links."""

    def __init__(self, name):
        self.name, self.path = name, ROOT / f"{name}.py"
        self.text = self.path.read_text(encoding="utf-8")
        self.lines, self.tree = self.text.splitlines(), ast.parse(self.text)
        self.defs, self.starts, self.docs = {}, {}, {}
        for node, prefix in self.definitions(self.tree, ""):
            self.defs[prefix + node.name] = node
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            self.starts[first] = prefix + node.name
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
                self.docs[node.body[0].lineno] = node.body[0].end_lineno, ast.get_docstring(node)

    def definitions(self, node, prefix):
        for child in node.body:
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                yield child, prefix
            if isinstance(child, ast.ClassDef):
                yield from self.definitions(child, f"{child.name}.")

    def link(self, name):
        """Where a name that stands in prose or code leads, or nothing."""
        if name.startswith("common.") and name[7:] in SOURCES["common"].defs:
            return f"common.html#{name[7:]}"
        if name in self.defs:
            return f"#{name}"
        methods = [full for full in self.defs if full.endswith(f".{name}")]
        return f"#{methods[0]}" if len(methods) == 1 and "." not in name else ""

    def links(self):
        """{(line, column): (end column, target)} of all names in the code that are defined in our files."""
        found = {}

        def visit(node, local, owner):
            if isinstance(node, ast.JoinedStr):  # places in it are known from Python 3.12 on
                return
            if isinstance(node, ast.ClassDef):
                owner = node.name
            if isinstance(node, ast.FunctionDef):
                local = local | {x.arg for x in ast.walk(node) if isinstance(x, ast.arg)} | {
                    x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
            target = ""
            if isinstance(node, ast.Name) and node.id not in local:
                target = f"#{node.id}" if node.id in self.defs else \
                    f"common.html#{node.id}" if node.id == "flag" and self.name != "common" else ""
            if isinstance(node, ast.Attribute):
                base = ast.unparse(node.value)
                if base == "common" and self.name != "common":
                    target = self.link(f"common.{node.attr}")
                elif base == "self":
                    target = f"#{owner}.{node.attr}" if f"{owner}.{node.attr}" in self.defs else ""
                elif base in ("model", "config", "self.config") and node.attr not in self.defs:
                    target = self.link(node.attr)
            if target:
                word = node.id if isinstance(node, ast.Name) else node.attr
                end = len(self.lines[node.end_lineno - 1].encode()[:node.end_col_offset].decode())
                found[node.end_lineno, end - len(word)] = end, target
            for child in ast.iter_child_nodes(node):
                visit(child, local, owner)

        visit(self.tree, frozenset(), "")
        return found

    def highlight(self, shown, trees):
        """The lines of code as HTML; `shown`: {line: (value of its shape comment, flags of that run)}."""
        spans, links, depth = {line: [] for line in range(1, len(self.lines) + 1)}, self.links(), []
        before = ""
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            kind, start, end = tokenize.tok_name[token.type], token.start, token.end
            if kind == "FSTRING_START":
                depth.append(start)
            elif kind == "FSTRING_END":
                kind, start = "STRING", depth.pop()
            word = {"STRING": "s", "NUMBER": "n", "COMMENT": "c"}.get(kind, "")
            if kind == "NAME":
                word = "k" if keyword.iskeyword(token.string) else "d" if before in ("def", "class") else ""
            before = token.string
            if depth or not word and start not in links:
                continue
            for line in range(start[0], end[0] + 1):
                left, right = start[1] * (line == start[0]), end[1] if line == end[0] else len(self.lines[line - 1])
                spans[line].append((left, right, word, links.get(start, ("", ""))[1]))
        rows = [""]
        for number, line in enumerate(self.lines, 1):
            place, row = 0, ""
            for left, right, word, target in spans[number]:
                text = html.escape(line[left:right], quote=False)
                if word == "c":
                    text = f"<i class={'shape' if number in trees else 'c'}>{marks(text)}</i>"
                elif word:
                    text = f"<b class={word}>{marks(text)}</b>"
                text = f'<a href="{target}">{text}</a>' if target else text
                row += html.escape(line[place:left], quote=False) + text
                place = right
            row += html.escape(line[place:], quote=False)
            if number in shown:
                value, flags = shown[number]
                row += f" <span class='value{' other' * bool(flags)}'>{value}</span>"
            rows.append(row)
        return rows

    def rows(self):
        """The file in rows: (title of a section, names of definitions, prose, numbers of its lines of code). A comment
        and a definition begin a row, but for a method without a docstring that follows what its class is."""
        alone = {line: text for line, text, alone in comments(self.text) if alone}
        found, number = [["", [], "", []]], self.tree.body[0].end_lineno + 1
        while number <= len(self.lines):
            line, (_, names, _, code) = self.lines[number - 1], found[-1]
            start = self.starts.get(number, "")
            documented = start and self.defs[start].body[0].lineno in self.docs
            if banner := re.fullmatch(r"# (?:-{9,}|---- (\d+  .*?) -+)", line):
                found.append([banner[1] or alone[number + 1], [], "", []])
                number += not banner[1]
            elif (number in alone or start and (documented or "." not in start or not names)) and (code or names):
                found.append(["", [], "", []])
                continue
            elif number in alone:
                found[-1][2] += f" {alone[number]}"
            elif number in self.docs:
                number, text = self.docs[number]
                found[-1][2] += f"\n\n{text}"
            elif line.strip() or code:
                names += [start] * bool(start)
                code.append(number)
            number += 1
        return [row for row in found if row[0] or row[2].strip() or row[3]]


def proofs(name, module=""):
    """{definition of `module`: {check: (golden cases, count)}}: the checks of tests/test_NAME.py that fail where a
    mistake is put into the definition, as the test's own table of mistakes has it."""
    text, found = (ROOT / f"tests/test_{name}.py").read_text(encoding="utf-8"), {}
    golden = torch.load(ROOT / f"tests/golden/{name}.pt")
    keys = list(golden.get("cases") or golden.get("variants") or golden)
    match = re.search(r"^([A-Z]\w*(?:, [A-Z]\w*)+) = .*CASES", text, re.M)
    names = dict(zip(match[1].split(", "), keys)) if match else {}
    of_check = {name: set(re.findall(r'GOLDEN\["(\w+)"\]', body)) - {"variants", "cases"} for name, body in
                re.findall(r"^def (check_\w+)(.*?)(?=^\w|\Z)", text, re.M | re.S)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "test_checks":
            for key, rows in zip(node.value.args[1].keys, node.value.args[1].values):
                check, case = (ast.unparse(x) for x in getattr(key, "elts", [key, key]))
                case = names.get(case, ast.literal_eval(case) if case[0] in "'\"" else case)
                for row in getattr(rows, "elts", []):
                    places = [x.value for x in getattr(row, "elts", [])[1::3] if isinstance(x, ast.Constant)]
                    for place in {place.rpartition(":")[2] for place in places if place.rpartition(":")[0] == module}:
                        cases = found.setdefault(place, {}).setdefault((name, check), [set(), 0])
                        cases[0] |= {case} & {*keys} | of_check.get(check, set())
                        cases[1] += 1
    return found


# -- pages
def page(name, title, body):
    there = [key for key in PAGES if key in TITLES or key == "index" or (ROOT / f"docs/{key}.md").exists()]
    menu = " ".join(f"<a href={key}.html{' aria-current=page' * (key == name)}>{PAGES[key]}</a>" for key in there)
    style = (ROOT / "docs/style.css").read_text(encoding="utf-8")
    return ("<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width, "
            f"initial-scale=1'><title>{title} - readable-mim</title><link rel=icon href='data:,'><style>{style}</style>"
            f"</head>\n<body><nav>{menu}</nav>\n<main>{body}</main></body></html>\n")


def code_page(source, shown, trees, figures, sizes):
    """A file of ours: its card, then rows of notes and code."""
    code, out, deltas, titles, owner = source.highlight(shown, trees), [], [], [], ""
    proof = [proofs(source.name)] if source.name in RUNS else [proofs(name, source.name) for name in RUNS]
    for title, names, prose, numbers in source.rows():
        if title:
            titles.append(re.sub("^\\d+ +", "", title).split(":")[0])
            out.append(f'<h2 id="s-{titles[-1].lower()}">{title}</h2>')
        owner = (names or [owner * (not title)])[0]
        while numbers and not source.lines[numbers[-1] - 1].strip():
            numbers.pop()
        departs = "Δ" in prose or any("Δ" in source.lines[number - 1] for number in numbers)
        deltas += [owner] * (departs and owner != "" and owner not in deltas)
        left = paragraphs(prose, source.link) if prose.strip() else ""
        for (test, check), (cases, count) in (x for name in names for p in proof for x in p.get(name, {}).items()):
            golden = " and ".join(f"<code>{case}</code>" for case in sorted(cases))
            golden = f", golden case{'s' * (len(cases) > 1)} {golden}" * bool(golden)
            left += (f"<p class=proof>Test <a href=../../tests/test_{test}.py><code>{check}</code></a>{golden}: "
                     f"it finds {count} mistake{'s' * (count > 1)} put in here.</p>")
        flags = dict.fromkeys(shown[number][1] for number in numbers if number in shown and shown[number][1])
        if flags:
            left += f"<p class=proof>In blue: shapes of runs with <code>{'</code>, <code>'.join(flags)}</code>.</p>"
        left += "".join(figures.pop(name, "") for name in names)
        lines = "\n".join(f'<span id="{source.starts[number]}">{code[number]}</span>' if number in source.starts
                          else code[number] for number in numbers)
        out.append(f"<div class='row{' departs' * departs}'><div class=prose>{left}</div>"
                   + f"<pre>{lines}</pre>" * bool(numbers) + "</div>")
    if figures:
        raise ValueError(f"{source.name}.py defines no {', '.join(figures)}, where pictures were to stand")
    marked = ", ".join(f'<a href="#{name}"><code>{name}</code></a>' for name in deltas)
    head = card(ast.get_docstring(source.tree), source.link, sizes, marked)
    parts = "".join(f'<a href="#s-{title.lower()}">{title}</a> ' for title in titles)
    return page(source.name, TITLES[source.name], f"{head}<p class=parts>{parts}</p>" + "\n".join(out))


def build(folder):
    folder.mkdir(parents=True, exist_ok=True)
    modules = {name: importlib.import_module(name) for name in RUNS}
    trace = Trace({str(source.path): source.text for source in SOURCES.values()})
    results, shown = {name: {} for name in RUNS}, {str(source.path): {} for source in SOURCES.values()}
    for name, module in modules.items():
        for flags in RUNS[name]:
            results[name][flags] = pictures.execute(module, flags, trace)
            for file, calls in trace.calls.items():
                for line, shapes, _ in (event for call in calls.values() for event in call[1]):
                    shown[file].setdefault(line, (pictures.spell(shapes), flags))
    if false := trace.report(unseen=False):
        raise ValueError("a shape comment is false\n" + "\n".join(false))
    texts = {}
    for name, source in SOURCES.items():
        figures = getattr(pictures, f"of_{name}")(results[name]) if name in RUNS else {}
        sizes = results[name][""][0] if name in RUNS else {}
        texts[name] = code_page(source, shown[str(source.path)], trace.files[str(source.path)][1], figures, sizes)
    claims, readme = ROOT / "results/claims.md", (ROOT / "README.md").read_text(encoding="utf-8")
    claims = re.sub("(?m)^#", "##", claims.read_text(encoding="utf-8").partition("\n")[2]) if claims.exists() else \
        "The runs of this comparison are not finished."
    parts = dict(picture=pictures.of_index(results["mfm_mae"]), claims=markdown(claims, "results"),
                 runs=markdown(re.search(r"## Runs\n\n((?:\|.*\n)+)", readme)[1], ""))
    for name in ("index", "exercises", "answers"):
        if (path := ROOT / f"docs/{name}.md").exists():
            text = markdown(path.read_text(encoding="utf-8"), "docs")
            texts[name] = page(name, PAGES[name], re.sub(r"<p>\{(\w+)\}</p>", lambda m: parts[m[1]], text))
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")


SOURCES = {name: Source(name) for name in TITLES}


def main():
    torch.set_num_threads(1)  # sums in one order: the same bytes each time
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/site")


if __name__ == "__main__":
    pictures.common.run_main(main)

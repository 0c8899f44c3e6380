"""The words of the pages of docs/build.py as HTML: notes, cards with their data flow and formulas, and Markdown."""

import base64
import html
import os
import re

from docs.shapes import ROOT

TITLES = dict(mfm_mae="MFM", beyond_masking="Beyond Masking", cae_v2="CAE v2", common="common.py")
LEADS = "The idea in one sentence|Why|In the code|Dimension key|What differs from MAE|Recipe|Sources|Commands"
PAGES = {"index": "Start", **TITLES, "exercises": "Exercises", "answers": "Answers"}


def inline(text, link=lambda name: ""):
    """Words as HTML: `code`, [D1], Δ, tags of sources, arXiv numbers; `link` tells where a name leads."""
    def code(match):
        target = link(match[1])
        return f'<a href="{target}"><code>{match[1]}</code></a>' if target else f"<code>{match[1]}</code>"
    text = re.sub(r"(?<![`\w.])common\.\w+(?!\.?\w)", lambda name: f"`{name[0]}`" if link(name[0]) else name[0], text)
    text = re.sub(r"`([^`]+)`", code, html.escape(text, quote=False))
    text = re.sub(r"arXiv (\d{4}\.\d{5})", r'arXiv <a href="https://arxiv.org/abs/\1">\1</a>', text)
    return marks(re.sub(r"\[(code|abs|readme|fork|mae|issue|T)\](?!\()", r"<small>[\1]</small>", text))


def marks(text):
    """Decisions and Δ lead to the card."""
    text = re.sub(r"(\[)?\b(D\d+)\b(?(1)\])", r'<a class=decision href="#\2">\g<0></a>', text)
    return text.replace("Δ", '<a class=delta href="#differs" title="departs from MAE">Δ</a>')


def paragraphs(text, link):
    return "".join(f"<p>{inline(' '.join(part.split()), link)}</p>" for part in re.split(r"\n\s*\n", text))


def formula(text):
    """A line such as `w = softmax(s)` as MathML."""
    text = re.sub(r"(\w\w) \(", r"\1 ~(", text)  # no function, but a word before a bracket
    tokens = re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?|[A-Za-z]+'?|\S", text)

    def atom(first=False):
        token = tokens.pop(0)
        if token == "sum" and tokens[:1] == ["_"]:
            return "<mo>∑</mo>"
        if token == "sqrt":
            tokens.pop(0)
            return f"<msqrt>{row(')')}</msqrt>"
        if token in ("~", "phi"):
            return "<mi>φ</mi>" if token == "phi" else ""
        if len(token.strip("'")) > 1 and token[0].isalpha():
            while tokens and re.fullmatch("[A-Za-z]{2,}'?", tokens[0]) and tokens[0] not in ("phi", "sqrt"):
                token += " " + tokens.pop(0)
            before, after = "\xa0" * (not first), "\xa0" * (tokens[:1] not in (["("], [","]))
            return f"<mtext>{before}{token}{after}</mtext>".replace("'", "’")
        if token[1:] == "'":
            return f"<msup><mi>{token[0]}</mi><mo>′</mo></msup>"
        kind = "mn" if token[0].isdigit() else "mi" if token[0].isalpha() else "mo"
        return f"<{kind}>{token.replace('-', '−') if kind == 'mo' else token}</{kind}>"

    def row(end=None):
        parts = []
        while tokens and tokens[0] != end:
            base = atom(not parts)
            while tokens[:1] in (["_"], ["^"]):
                kind = "msub" if tokens.pop(0) == "_" else "msup"
                base = f"<{kind}><mrow>{base}</mrow>{atom(True)}</{kind}>"
            parts.append(base)
        tokens[:1] = []
        return "".join(parts)

    return f"<math>{row()}</math>"


def flow(lines):
    """The card's data flow in characters as a drawing: runs of - are lines, | go on, + turn."""
    width, text, paths = max(map(len, lines)), [], []
    for y, line in enumerate(lines):
        joint = lambda row, x: 0 <= row < len(lines) and lines[row][x:x + 1] in ("|", "+")  # noqa: E731
        for run in re.finditer(r"(?<![\w)])(\+-*|-+\+|--+)(?!\w)(\+?)", line):
            ends = [8 * run.start() + 4 * (run[0][0] == "+"), 8 * run.end() - 4 * (run[0][-1] == "+")]
            paths.append(f"M{ends[0]} {20 * y + 10}H{ends[1]}")
            paths += [f"M{8 * x + 4} {20 * y + 10}v{10 if row > y else -10}" for x in range(run.start(), run.end())
                      for row in (y - 1, y + 1) if line[x] == "+" and joint(row, x)]
            line = line[:run.start()] + " " * len(run[0]) + line[run.end():]
        for x in (x for x, letter in enumerate(line) if letter == "|"):
            paths.append(f"M{8 * x + 4} {20 * y}v20")
        for word in re.finditer(r"[^\s|]+(?: [^\s|]+)*", line):
            text.append(f'<text x="{8 * word.start()}" y="{20 * y + 14}" textLength="{8 * len(word[0])}">'
                        f"{html.escape(word[0])}</text>")
    return (f'<div class=scroll><svg class=flow role=img aria-label="data flow" viewBox="0 0 {8 * width} '
            f'{20 * len(lines)}" width="{8 * width}"><path d="{"".join(paths)}"/>{"".join(text)}</svg></div>')


def card(text, link, sizes, deltas):
    """A file's own docstring: prose, data flow, formulas, decisions, commands."""
    title, *blocks = re.split(r"\n *\n", text.strip("\n"))
    out = [f"<h1>{inline(title, link)}</h1>"]
    for block in blocks:
        for lines in re.findall(r"(?:^ {2}.*\n?)+|(?:^(?! {2}).*\n?)+", block, re.M):
            rows = lines.rstrip("\n").split("\n")
            if not lines.startswith("  "):
                anchor = " id=differs" if lines.startswith("What differs") else ""
                lead = re.sub(f"^((?:{LEADS})(?: \\(.*?\\))?):", r"**\1:**", " ".join(rows))
                body = re.sub(r"\*\*(.*?)\*\*", r"<b>\1</b>", inline(lead, link))
                out.append(f"<p{anchor}>{body}</p>" + (f"<p class=note>In the code: {deltas}</p>" if anchor else ""))
            elif "  [D" in lines:
                items = re.findall(r"\[(D\d+)\] (.*?)(?=\n  \[D|\Z)", lines, re.S)
                out.append("<dl>" + "".join(f"<dt id={name}>{name}</dt><dd>{inline(' '.join(said.split()), link)}</dd>"
                                            for name, said in items) + "</dl>")
            elif " -- " in lines:
                out.append(flow([row.rstrip()[2:] for row in rows]))
            elif re.search(r"^ +loss +=", lines, re.M):
                for row in rows:
                    label, equations = re.fullmatch(r" +(?:(\w+):)? *(.*)", row).groups()
                    out.append("<p class='scroll math'>" + (f"<code>{label}</code>: " if label else "")
                               + " ".join(formula(part) for part in re.split(r",?  +(?=\w+\S* *=|for )", re.sub(
                                   " +=", " =", equations))) + "</p>")
            else:
                out.append(f"<pre class=scroll>{marks(html.escape(chr(10).join(rows)))}</pre>")
        if block.startswith("Dimension key"):
            known = f": {', '.join(f'{name} = {size}' for name, size in dict(B=2, **sizes).items())}" * bool(sizes)
            out.append("<p class=note>Beside a shape stands <span class=value>what it was</span> in a run of the demo "
                       f"with two images, seeded and untrained{known or ': that of MFM where it uses the line'}.</p>")
    return f"<section class=card>{''.join(out)}</section>"


def markdown(text, base):
    """Markdown as HTML: headings, paragraphs, lists, tables, fenced code, and what `span` knows. `base`: its folder."""
    def target(href):
        if re.match(r"#|\w+:", href):
            return href
        path, _, anchor = href.partition("#")
        path = os.path.normpath(os.path.join(base, path))
        for name in PAGES:
            if path in (f"{name}.py", f"docs/{name}.md"):
                return f"{name}.html" + f"#{anchor}" * bool(anchor)
        return f"../../{path}" + f"#{anchor}" * bool(anchor)

    def image(match):
        file = ROOT / base / match[2]
        kind = "svg+xml" if file.suffix == ".svg" else "png"
        content = base64.b64encode(file.read_bytes()).decode()
        return f'<img class=plot alt="{match[1]}" src="data:image/{kind};base64,{content}">'

    def span(text):
        codes = []
        text = re.sub(r"`([^`]+)`", lambda m: codes.append(m[1]) or f"\0{len(codes) - 1}\0", text)
        text = re.sub(r"!\[(.*?)\]\((.*?)\)", image, html.escape(text, quote=False))
        text = re.sub(r"\[(.*?)\]\((.*?)\)", lambda m: f'<a href="{target(m[2])}">{m[1]}</a>', text)
        text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
        text = re.sub(r"(?<![\w*])\*(?! )(.+?)\*", r"<i>\1</i>", text)
        text = re.sub("\0(\\d+)\0", lambda m: f"<code>{html.escape(codes[int(m[1])])}</code>", text)
        return text.replace(r"\|", "|")

    out, rest = [], text.strip() + "\n"
    while rest:
        if found := re.match(r"```.*\n((?:.*\n)*?)```\n", rest):
            out.append(f"<pre class=scroll>{html.escape(found[1])}</pre>")
        elif found := re.match(r"(#+) (.*)\n", rest):
            slug, level = re.sub(r"[^\w -]", "", found[2].lower()).strip().replace(" ", "-"), len(found[1])
            out.append(f'<h{level} id="{slug}">{span(found[2])}</h{level}>')
        elif found := re.match(r"(?:\|.*\n)+", rest):
            rows = [re.split(r" ?(?<!\\)\| ?", line.strip()[1:-1].strip(" ")) for line in found[0].splitlines()]
            cells = ["".join(f"<{kind}>{span(cell)}</{kind}>" for cell in row)
                     for kind, row in zip(["th", *["td"] * len(rows)], [rows[0], *rows[2:]])]
            out.append("<div class=scroll><table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table></div>")
        elif found := re.match(r"(?:[-*] .*\n(?: +.*\n)*\n?)+|(?:\d+\. .*\n(?: +.*\n)*\n?)+", rest):
            kind, items = "ol" if rest[0].isdigit() else "ul", re.split(r"(?m)^(?:[-*]|\d+\.) ", found[0])[1:]
            items = "".join(f"<li>{span(' '.join(item.split()))}</li>" for item in items)
            out.append(f"<{kind}>{items}</{kind}>")
        elif found := re.match(r"<.*\n", rest):  # a line of HTML, for what this file puts in
            out.append(found[0])
        elif found := re.match(r"(?:[^\n].*\n)+?(?=\n|```|#|\||[-*] |\Z)|\n+", rest):
            out.append(f"<p>{span(' '.join(found[0].split()))}</p>" if found[0].strip() else "")
        rest = rest[found.end():]
    return "\n".join(out)

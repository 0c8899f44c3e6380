"""Tables in Markdown and plots in SVG, for claims.md: the same bytes on each machine."""

import math
import statistics

STUDENT_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}  # 95 %, by degrees of freedom


def judged(name, differences):
    """A row about differences between runs of the same seeds: mean, standard error, and what that means."""
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    bound = STUDENT_T[len(differences) - 1] * error
    word = "shows" if mean > bound else "opposite" if mean < -bound else "does not show"
    return [name, f"{mean:+.2f}", f"{error:.2f}", word]


def spread(values, digits=1):
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table(rows):
    """Rows of text, the first of them the head."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def chart(columns, series):
    """An SVG: for each column and series {label: a list of values per column} dots, and a line through means."""
    values = [value for row in series.values() for cell in row for value in cell]
    low = math.floor(min(values) / 5) * 5
    high = max(math.ceil(max(values) / 5) * 5, low + 5)
    width, colours = 680 / len(columns), ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#555555")
    y = lambda value: f"{250 - 220 * (value - low) / (high - low):.1f}"  # noqa: E731
    parts = [f'<text x="44" y="{y(tick)}" text-anchor="end">{tick}</text><path d="M50 {y(tick)}H730" stroke="#ddd"/>'
             for tick in range(low, high + 1, 5)]
    parts += [f'<text x="{50 + (place + .5) * width:.1f}" y="{270 + place % 2 * 13 * (len(columns) > 6)}" '
              f'text-anchor="middle">{column}</text>' for place, column in enumerate(columns)]
    parts += ['<text x="730" y="16" text-anchor="end">per cent of the test images</text>']
    for number, (label, row) in enumerate(series.items()):
        colour, shift = colours[number], 50 + width / 2 + 6 * (number - (len(series) - 1) / 2)
        places = [f"{shift + place * width:.1f}" for place in range(len(columns))]
        means = " ".join(f"{x},{y(statistics.mean(cell))}" for x, cell in zip(places, row))
        parts += [f'<polyline points="{means}" fill="none" stroke="{colour}"/>'
                  f'<text x="{60 + 110 * number}" y="16" fill="{colour}">{label}</text>',
                  *(f'<circle cx="{x}" cy="{y(value)}" r="3" fill="{colour}" fill-opacity=".6"/>'
                    for x, cell in zip(places, row) for value in cell)]
    return ('<svg xmlns="http://www.w3.org/2000/svg" width="740" height="290" font-family="sans-serif" font-size="11">'
            '<rect width="740" height="290" fill="white"/>' + "\n".join(parts) + "</svg>\n")

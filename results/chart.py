"""A plot as SVG text: the same bytes on each machine, and readable at each size."""

import math
import statistics


def chart(columns, series):
    """An SVG: for each column and series {label: a list of values per column} dots, and a line through means."""
    values = [value for row in series.values() for cell in row for value in cell]
    low, high = math.floor(min(values) / 5) * 5, math.ceil(max(values) / 5) * 5
    width, colours = 680 / len(columns), ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#555555")
    y = lambda value: f"{250 - 220 * (value - low) / (high - low):.1f}"  # noqa: E731
    parts = [f'<text x="44" y="{y(tick)}" text-anchor="end">{tick}</text><path d="M50 {y(tick)}H730" stroke="#ddd"/>'
             for tick in range(low, high + 1, 5)]
    parts += [f'<text x="{50 + (place + .5) * width:.1f}" y="270" text-anchor="middle">{column}</text>'
              for place, column in enumerate(columns)]
    for number, (label, row) in enumerate(series.items()):
        colour, shift = colours[number], 50 + width / 2 + 6 * (number - (len(series) - 1) / 2)
        places = [f"{shift + place * width:.1f}" for place in range(len(columns))]
        means = " ".join(f"{x},{y(statistics.mean(cell))}" for x, cell in zip(places, row))
        parts += [f'<polyline points="{means}" fill="none" stroke="{colour}"/>'
                  f'<text x="{60 + 110 * number}" y="16" fill="{colour}">{label}</text>',
                  *(f'<circle cx="{x}" cy="{y(value)}" r="3" fill="{colour}" fill-opacity=".6"/>'
                    for x, cell in zip(places, row) for value in cell)]
    return ('<svg xmlns="http://www.w3.org/2000/svg" width="740" height="280" font-family="sans-serif" font-size="11">'
            '<rect width="740" height="280" fill="white"/>' + "\n".join(parts) + "</svg>\n")

"""Reads the Markdown tables that the benchmarks write."""


def rows_starting(text: str, first: str) -> list[list[str]]:
    """The cells of every line of a table whose first cell is ``first``."""
    lines = (line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

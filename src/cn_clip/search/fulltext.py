"""stub"""


def tokens(text: str) -> str:
    return " ".join(text)


def match_expression(query: str) -> str:
    return " ".join('"' + c.replace('"', '""') + '"' for c in query.split())

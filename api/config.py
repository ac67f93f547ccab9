"""What the configuration says of the upstreams: a table of TOML for each, checked to the last value.

What is wrong is one line that names it (``ConfigError``). A parameter is part of a path segment or of a query value; it
can change neither the host nor the path. Pure: the text and the environment are arguments.
"""

from __future__ import annotations

import dataclasses
import re
import string
import tomllib
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

import orjson

# Parameters of the API itself, which those of an upstream would hide.
RESERVED = frozenset(("source", "sources", "deadline_ms", "limit", "before", "hours"))
MOST = {"max_bytes": 5e6, "timeout": 60.0, "keys": 1e5, "retries": 10, "concurrency": 1000, "failures": 1000}
"""The greatest values in a configuration. To read 5 MB of JSON keeps the event loop for about 25 ms."""
IN_TEXT, IN_HEADERS = r"\$\{([^}]*)\}", r"\$(?:(\$)|\{([^}]*)\}|(\w+))"  # what stands for a variable's value
Key = tuple[str, ...]  # the values of an upstream's parameters, in their order


class ConfigError(ValueError):
    """One line that names what is wrong in the configuration."""


@dataclasses.dataclass(frozen=True, slots=True)
class Upstream:
    """What the configuration says of an upstream; times are in seconds, ``parameters`` are names and defaults.

    ``body`` is sent as JSON; its texts may hold placeholders too. ``hedge``: ask a second time when the first has not
    answered after so long (0: never), for at most a tenth of the calls. An open circuit lets a probe through after
    ``reset``, and if that fails, after twice as long, up to ``max_reset``: the shorter, the sooner all is well again.
    """

    name: str
    url: str
    parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    method: str = "GET"
    body: Any = None
    timeout: float = 2.0
    hedge: float = 0.0
    ttl: float = 10.0
    stale: float = 60.0
    stale_if_error: float = 600.0
    retries: int = 1
    failures: int = 5
    window: float = 10.0
    reset: float = 2.0
    max_reset: float = 3.0
    concurrency: int = 16
    max_bytes: int = 1_000_000
    keys: int = 1000
    keep: str = ""
    fallback: Any = None

    def address(self, key: Key) -> str:
        """The URL for these values of the parameters, percent-encoded where it was not."""
        values = zip(self.parameters, key, strict=True)
        url = self.url.format_map({name: quote(value, safe="") for name, value in values})
        return quote(re.sub("%(?![0-9A-Fa-f]{2})", "%25", url), safe="%!#$&'()*+,/:;=?@[]~")

    def in_path(self) -> set[str]:
        """The parameters that are part of its path."""
        return {field for _, field, _, _ in string.Formatter().parse(urlsplit(self.url).path) if field}

    def content(self, key: Key) -> bytes | None:
        """The body for these values of the parameters: JSON, in which a value stays a part of its text."""
        if self.body is None:
            return None
        values = dict(zip(self.parameters, key, strict=True))

        return orjson.dumps(
            _each_text(self.body, lambda text: re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), text))
        )


def read_config(text: str, environ: Mapping[str, str]) -> dict[str, Upstream]:
    """The upstreams of a TOML configuration, by name: a table ``[name]`` each. Raises ``ConfigError``.

    ``${NAME}`` in a URL, a body or a header's value stands for a variable of the environment: secrets need not be in
    the file. In a header ``$NAME`` does, too, and ``$$`` is ``$``.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not TOML: {error}") from None
    if not tables:
        raise ConfigError("no upstream: a table [name] with a url is needed for each")
    return {name: _upstream(name, table, environ) for name, table in tables.items()}


def _upstream(name: str, table: Any, environ: Mapping[str, str]) -> Upstream:
    if not isinstance(table, dict):
        raise ConfigError(f"{name}: not a table; an upstream is [{name}] with a url")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,40}", name):
        raise ConfigError(f"{name!r}: a name is made of up to 41 letters, digits, _ and -, and begins with a letter")
    known = {field.name for field in dataclasses.fields(Upstream)} - {"name"}
    whole = ("retries", "failures", "concurrency", "max_bytes", "keys")
    given: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"{name}.{key}: no such key; there are {', '.join(sorted(known))}")
        if key in ("parameters", "headers"):
            if not isinstance(value, dict) or not all(isinstance(v, (str, int, float)) for v in value.values()):
                raise ConfigError(f"{name}.{key}: a table of names and texts is needed")
            if key == "parameters" and (reserved := RESERVED.intersection(value)):
                raise ConfigError(f"{name}.parameters: {', '.join(sorted(reserved))} means something to the API itself")
            value = {name: str(text).lower() if isinstance(text, bool) else str(text) for name, text in value.items()}
        elif key in ("url", "keep", "method"):
            if not isinstance(value, str):
                raise ConfigError(f"{name}.{key}: a text is needed, not {value!r}")
            if key == "method" and value not in ("GET", "POST"):
                raise ConfigError(f"{name}.method: GET or POST is needed, not {value!r}")
        elif key in ("fallback", "body"):
            try:
                orjson.dumps(value)
            except TypeError as error:  # a whole number of more than 64 bits, say
                raise ConfigError(f"{name}.{key}: no JSON: {error}") from None
        else:
            if not isinstance(value, int if key in whole else (int, float)) or isinstance(value, bool):
                raise ConfigError(f"{name}.{key}: a {'whole ' * (key in whole)}number is needed, not {value!r}")
            least = 0 if key in ("retries", "stale", "stale_if_error", "hedge") else 1 if key in whole else 0.001
            most = MOST.get(key, 1e9)
            if not least <= float(value) <= most:
                raise ConfigError(f"{name}.{key}: a number from {least} to {most:g} is needed, not {value!r}")
        given[key] = value
    if "url" not in given:
        raise ConfigError(f"{name}.url: missing")
    if "body" in given and given.get("method") != "POST":
        raise ConfigError(f"{name}.body: only a POST has one")
    if given.get("method") == "POST":
        given.setdefault("retries", 0)  # whether it may be sent twice, only its owner knows
    for header, value in given.get("headers", {}).items():
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", header):
            raise ConfigError(f"{name}.headers: {header!r} is no name of a header")
        text = given["headers"][header] = _substituted(value, environ, f"{name}.headers.{header}", IN_HEADERS).strip()
        if not re.fullmatch(r"[\t\x20-\x7e\x80-\xff]*", text):
            raise ConfigError(f"{name}.headers.{header}: a character that no header can have")
    given["url"] = _read_url(given["url"].strip(), environ, f"{name}.url")
    if "body" in given:
        given["body"] = _each_text(given["body"], lambda text: _substituted(text, environ, f"{name}.body"))
    upstream = Upstream(name=name, **given)
    _check_url(upstream)
    return upstream


def _substituted(
    text: str, environ: Mapping[str, str], where: str, form: str = IN_TEXT, change: Callable[[str], str] = str
) -> str:
    """With the values of variables, without the blanks and line ends around them, in place of what ``form`` matches."""

    def value(match: re.Match[str]) -> str:
        name = match[match.lastindex or 0]
        if name == "$":
            return name
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.A):
            raise ConfigError(f"{where}: {match[0]!r} holds no name of a variable")
        if name not in environ:
            raise ConfigError(f"{where}: {name!r} is not in the environment")
        return change(environ[name].strip())

    return re.sub(form, value, text)


def _read_url(text: str, environ: Mapping[str, str], where: str) -> str:
    """With its variables (percent-encoded after the host: there they are part of something) and a host in ASCII."""
    end = len(re.split(r"(?<![/:])[/?#]", text, maxsplit=1)[0])
    rest = _substituted(text[end:], environ, where, change=lambda value: quote(value, safe=""))
    url = _substituted(text[:end], environ, where) + rest
    try:
        host = urlsplit(url).netloc
        return url if host.isascii() else url.replace(host, host.encode("idna").decode(), 1)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _each_text(part: Any, change: Callable[[str], Any]) -> Any:
    """JSON with each of its texts changed."""
    if isinstance(part, str):
        return change(part)
    if isinstance(part, list):
        return [_each_text(inner, change) for inner in part]
    return {name: _each_text(inner, change) for name, inner in part.items()} if isinstance(part, dict) else part


def _check_url(upstream: Upstream) -> None:
    """A placeholder may stand in a path segment or in the query only, where it can change nothing else."""
    where = f"{upstream.name}.url"
    if re.search(r"[\x00-\x1f\x7f]", upstream.url):  # urlsplit would take them out
        raise ConfigError(f"{where}: a control character")
    try:
        fields = [field for field in string.Formatter().parse(upstream.url) if field[1] is not None]
        parts = urlsplit(upstream.url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    for _, name, form, conversion in fields:
        if name not in upstream.parameters:
            raise ConfigError(f"{where}: {{{name}}} is not among its parameters")
        if form or conversion:
            raise ConfigError(f"{where}: {{{name}}} is written without ! and :")
    fixed = parts.hostname and port != 0 and not re.search(r"[{@\s]", parts.netloc) and "{" not in parts.fragment
    if parts.scheme not in ("http", "https") or not fixed:
        raise ConfigError(f"{where}: http:// or https:// and a fixed host are needed")
    used = {name for _, name, _, _ in fields}
    _each_text(upstream.body, lambda text: used.update(re.findall(r"\{(\w+)\}", text)))
    if unused := upstream.parameters.keys() - used:
        raise ConfigError(f"{upstream.name}.parameters: {', '.join(sorted(unused))} is used nowhere")


DEMO = """
weather = {{ url = "{base}/api/weather?city={{city}}", parameters = {{ city = "Berlin" }}, ttl = 5 }}
rates = {{ url = "{base}/api/rates/{{currency}}", parameters = {{ currency = "EUR" }}, keep = "rates" }}
news = {{ url = "{base}/api/news", keep = "items", ttl = 20 }}
flaky = {{ url = "{base}/api/flaky", ttl = 2, retries = 0, fallback = {{ note = "nothing better is known" }} }}
"""

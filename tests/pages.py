"""What a page holds, read without the code that wrote it."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np


class Reader(HTMLParser):
    """Collects what a browser would make of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.links, self.policy, self.title = [], [], None, ""
        self._in = None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._in = tag
        found = dict(attrs)
        self.links += [value for name, value in attrs if name in ("href", "src") or name.startswith("on")]
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"]

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, data):
        if self._in == "title":
            self.title += data


def scripts(page):
    """The scripts of a page by their type, as text."""
    return dict(re.findall(r'<script type="([\w/]+)"[^>]*>(.*?)</script>', page, re.DOTALL))


def content(page):
    """The data of a page."""
    return json.loads(scripts(page)["application/json"])


def numbers(packed):
    """An array of a page: float32, or int16 with a scale for each row."""
    kind = "f32" if "f32" in packed else "i16"
    values = np.frombuffer(base64.b64decode(packed[kind]), {"f32": "<f4", "i16": "<i2"}[kind]).reshape(packed["shape"])
    return values if kind == "f32" else values * numbers(packed["scale"])[:, None]


def shares(packed):
    """An array of shares from 0 to 1, in steps of 1 / 255."""
    return np.frombuffer(base64.b64decode(packed["u8"]), np.uint8).reshape(packed["shape"]) / 255

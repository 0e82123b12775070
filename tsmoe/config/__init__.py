"""Typed run configuration: layers of YAML and `key=value` decoded into frozen dataclasses."""

from tsmoe.config.layers import merge_layers, parse_override, read_yaml
from tsmoe.config.section import Section, decode, encode

__all__ = ["Section", "decode", "encode", "merge_layers", "parse_override", "read_yaml"]

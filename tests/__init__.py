"""Tests; a package, so that no other one of that name hides its oracles and samplers."""

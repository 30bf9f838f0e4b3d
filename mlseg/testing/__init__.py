"""Multilevel programs with known answers: for tests, comparisons and benchmarks, and yours.

:mod:`~mlseg.testing.programs` builds an engine from levels that are given by plain loss functions,
:mod:`~mlseg.testing.families` has such losses at their levels' minima, and
:mod:`~mlseg.testing.exact` finds the derivatives by means that share nothing with the library's.
"""

"""Measuring on a GPU: `hwpq-fx bench`, everything side by side, and `hwpq-fx tune`, which path is fastest where."""

"""Replies graded: rates with their intervals, several judges, paired statistics, export."""

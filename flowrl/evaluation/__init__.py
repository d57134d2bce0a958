"""Evaluation of one policy: its images, their scores and statistics, and the page that shows
them.
"""

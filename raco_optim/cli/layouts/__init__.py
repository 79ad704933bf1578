"""Layouts of preference data: how records of a data set become labelled pairs of answers.

known.py          a table of well-known data sets
rules.py          the rules of such an entry, or of a user's file
rules_file.py     reads that file
pairs.py          answers to a prompt -> pairs
conversations.py  texts and lists of messages
values.py         values of a record
"""

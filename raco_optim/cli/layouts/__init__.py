"""Layouts of preference data: how records of a data set become pairs of answers with labels.

known.py          the data sets that people use: a table
rules.py          what such an entry, or a file of one's own, may say
pairs.py          answers to a prompt -> pairs
conversations.py  texts and lists of messages
values.py         values of a record
"""

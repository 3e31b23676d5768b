"""Identify: whose call is this?"""

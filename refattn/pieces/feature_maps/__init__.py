"""Feature maps phi of linear attention: ``features(x, *weights, *numbers)`` maps the last axis to features, leading axes kept, with NumPy;
``pullback(d, x, *weights, *numbers)`` gives the gradients of x and of every weight for the cotangent d of the features, as a tuple.

x is [... T D] or [... H T D]; a weight with an axis of heads has as many as x.  Features use nothing but functions that are analytic wherever
they are smooth (no absolute value), so that they can be differentiated with a complex step.
"""

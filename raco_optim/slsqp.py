def solve_slsqp(C,D,b,c,w): raise NotImplementedError
